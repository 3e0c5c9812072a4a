"""Real engine processes over their sockets."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

from runner.engine.environment import MANY_CORES
from runner.engine.loader import load
from runner.engine.speculative.loading import load_draft
from runner.protocol import (
    VERSION,
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    AdapterSource,
    Cancel,
    Configure,
    DropAdapter,
    Grammar,
    Hello,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Loading,
    Rejected,
    Shutdown,
    Stats,
)
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.client import Client, EngineChild, engine_child
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.speculative.drafts import draft_folder

LONG = "hello there, " * 10
MESSAGES = [{"role": "user", "content": "hello"}]
ENDLESS = 400
FEW, MANY = MANY_CORES - 1, MANY_CORES
"""Cores, with which requests are read by the main thread, and by one of their own."""


@pytest.fixture
def start(tmp_path: Path, model_folder: ModelFolder) -> Iterator[Callable[..., EngineChild]]:
    """`start(**spec)`: an engine process on the tiny llama."""
    children = []

    def begin(**fields: Any) -> EngineChild:
        child = engine_child(tmp_path / str(len(children)), fields.pop("path", model_folder("llama")), **fields)
        children.append(child)
        return child.__enter__()

    yield begin
    for child in children:
        child.__exit__(None, None, None)


@pytest.fixture(scope="module", params=[FEW, MANY], ids=["reads between steps", "reads beside them"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder
) -> Iterator[EngineChild]:
    """One engine for tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("shared")
    with engine_child(folder, model_folder("llama"), cores=request.param, prefix_cache_bytes=1 << 20) as child:
        yield child


@pytest.fixture
def client(shared: EngineChild) -> Iterator[Client]:
    connected = shared.ready()
    yield connected
    connected.close()


def test_greets_loads_and_streams(start: Callable[..., EngineChild], model_folder: ModelFolder) -> None:
    child = start(digest="abc", model="chat")
    client = child.connect()
    loaded = client.wait(Loaded)
    hello = client.frames[0]
    assert isinstance(hello, Hello)
    assert (hello.version, hello.pid, hello.model, hello.digest) == (VERSION, child.process.pid, "chat", "abc")
    if not hello.loaded:
        stages = [frame.stage for frame in client.frames if isinstance(frame, Loading)]
        assert stages == ["importing", "weights", "adapters", "warmup"][-len(stages) :]
    assert loaded.max_context == 512
    assert 0 < loaded.weights_bytes <= loaded.active_bytes
    assert 0 < loaded.seconds < 30
    assert stat.S_IMODE(child.socket.stat().st_mode) == 0o600

    client.send(generate(1, messages=MESSAGES, max_tokens=20))
    answer = client.finish(1)

    assert answer.finish_reason == "length"
    in_process = Driver(load(model_folder("llama")))
    assert answer.text == in_process.one(messages=MESSAGES, max_tokens=20).text
    assert client.wait(Stats, rows=0, completion_tokens_total=20).active_bytes > 0


def test_a_draft_is_loaded_beside_the_model(
    start: Callable[..., EngineChild], model_folder: ModelFolder, tmp_path: Path
) -> None:
    draft = draft_folder(model_folder("llama"), tmp_path / "draft", "self")
    client = start(draft=str(draft), num_draft_tokens=3).connect()
    loaded = client.wait(Loaded)
    alone = load(model_folder("llama"))
    assert loaded.weights_bytes == alone.weights_bytes + load_draft(draft, alone, 0).weights_bytes
    client.send(generate(1, messages=MESSAGES, max_tokens=60))
    answer = client.finish(1)
    assert answer.text == Driver(alone).one(messages=MESSAGES, max_tokens=60).text
    stats = client.wait(Stats, rows=0, completion_tokens_total=60)
    assert answer.usage is not None
    assert answer.usage.accepted_tokens <= stats.accepted_tokens_total <= stats.drafted_tokens_total


def test_a_draft_with_other_tokens_is_refused(
    start: Callable[..., EngineChild], model_folder: ModelFolder, tmp_path: Path
) -> None:
    draft = draft_folder(model_folder("llama"), tmp_path / "draft", "self")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    numbers = list(vocabulary.values())
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, numbers[1:] + numbers[:1], strict=True))
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    child = start(draft=str(draft), num_draft_tokens=3)
    failed = child.connect().wait(LoadFailed)
    assert failed.reason.startswith(f"draft {draft} has another tokenizer than the model: ")
    assert "same family" in failed.hint
    assert child.exit_code() == 1


def test_a_draft_folder_that_is_no_model_is_named(start: Callable[..., EngineChild], tmp_path: Path) -> None:
    failed = start(draft=str(tmp_path), num_draft_tokens=3).connect().wait(LoadFailed)
    assert failed.reason == f"draft {tmp_path}: {tmp_path} is not a model folder: config.json is missing"


def test_a_model_that_cannot_take_tokens_back_goes_without_its_draft(
    start: Callable[..., EngineChild], model_folder: ModelFolder
) -> None:
    child = start(path=model_folder("lfm2"), draft=str(model_folder("llama")), num_draft_tokens=3)
    client = child.connect()
    loaded = client.wait(Loaded)
    (note,) = [note for note in loaded.notes if "speculation" in note]
    assert note == "no speculation: the model (lfm2ForCausalLM) keeps a state from which no token can be taken back"
    client.send(generate(1, messages=MESSAGES, max_tokens=10))
    assert client.finish(1).tokens == 10
    assert client.wait(Stats, rows=0, completion_tokens_total=10).drafted_tokens_total == 0


def test_keeps_keys_and_values_in_the_bits_of_its_spec(
    start: Callable[..., EngineChild], model_folder: ModelFolder
) -> None:
    child = start(path=model_folder("gemma3_text", wide=True), kv_bits=8, kv_group_size=32)
    assert "2 of 4 layers stay as they are" in child.connect().wait(Loaded).notes[-1]
    late = start(path=model_folder("gemma3_text", wide=True), kv_bits=8, kv_group_size=32, kv_start=24)
    client = late.connect()
    assert "2 of 4 layers stay as they are" in client.wait(Loaded).notes[-1]
    client.send(*(generate(length, prompt=[*range(length)], max_tokens=20) for length in (22, 40)))
    assert {client.finish(length).finish_reason for length in (22, 40)} <= {"stop", "length"}
    narrow = start(kv_bits=8, kv_group_size=64).connect().wait(LoadFailed)
    assert narrow.reason.startswith("kv_cache.bits: ")
    assert "group_size" in narrow.hint


def test_refuses_what_it_cannot_do(client: Client) -> None:
    client.send(generate(1, messages=MESSAGES, adapter="none"), generate(2, prompt=[]))
    assert client.wait(Rejected, id=1).status == 404
    assert client.wait(Rejected, id=2).param == "prompt"


def test_many_requests_get_what_each_gets_in_process(client: Client, model_folder: ModelFolder) -> None:
    """Of every kind, in one write; those that are refused say of which field."""
    contents = [f"question {i}: " + "and then " * (i % 7) for i in range(48)]
    before = client.wait(Stats).completion_tokens_total
    client.send(
        *(generate(i, messages=[{"role": "user", "content": text}], max_tokens=8) for i, text in enumerate(contents)),
        generate(100, messages=MESSAGES, count_only=True),
        generate(101, messages=MESSAGES, temperature=-1.0),
        generate(102, messages=MESSAGES, max_tokens=8, grammar=Grammar("regex", "[a-f]{3}", "regex")),
        generate(103, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]),
    )
    answers = [client.finish(i) for i in range(48)]
    driver = Driver(load(model_folder("llama")))
    for text, answer in zip(contents, answers, strict=True):
        assert answer.text == driver.one(messages=[{"role": "user", "content": text}], max_tokens=8).text
    counted = client.finish(100).usage
    assert counted is not None
    assert counted.prompt_tokens == len(driver.engine.intake._admission.row(generate(0, messages=MESSAGES), 0).prompt)
    assert client.wait(Rejected, id=101).param == "temperature"
    assert len(client.finish(102).text) == 3
    assert client.wait(Rejected, id=103).param == "tools"
    assert client.wait(Stats, rows=0, waiting=0, completion_tokens_total=before + 48 * 8 + client.answer(102).tokens)


def test_a_full_queue_refuses_those_that_it_has_no_place_for(client: Client) -> None:
    client.send(Configure(max_queue=0), generate(1, messages=MESSAGES), Configure(max_queue=1024))
    assert client.wait(Rejected, id=1).code == "queue_full"
    client.send(generate(2, messages=MESSAGES, max_tokens=2))
    assert client.finish(2).tokens == 2


def test_requests_that_are_cancelled_unread_count_as_cancelled(client: Client) -> None:
    before = client.wait(Stats).cancelled_total
    client.send(*(generate(i, prompt=LONG) for i in range(20)), *map(Cancel, range(20)))
    client.send(generate(20, prompt="a", max_tokens=2))
    assert client.finish(20).tokens == 2
    client.wait(Stats, rows=0, waiting=0, cancelled_total=before + 20)


def test_a_cancelled_request_sends_no_more(client: Client) -> None:
    client.send(generate(1, messages=MESSAGES, max_tokens=ENDLESS))
    client.until(lambda: client.answer(1).tokens)
    client.send(Cancel(1), generate(2, messages=MESSAGES, max_tokens=5))
    client.finish(2)
    said = client.answer(1).tokens
    client.send(generate(3, messages=MESSAGES, max_tokens=5))
    client.finish(3)
    assert client.answer(1).tokens == said < ENDLESS
    assert client.answer(1).ends == 0


def test_adapters_come_and_go_under_load(client: Client, tmp_path: Path, model_folder: ModelFolder) -> None:
    loaded = load(model_folder("llama"))
    pairs = draw(linear_shapes(loaded, ATTENTION), 4, 1)
    folder = write_mlx(tmp_path / "a", pairs)
    reference = Driver(loaded)
    plain = reference.one(messages=MESSAGES, max_tokens=60).text
    reference.engine.load_adapter(AdapterSource("a", str(folder)))
    adapted = reference.one(messages=MESSAGES, max_tokens=60, adapter="a").text
    assert plain != adapted

    client.send(generate(1, messages=MESSAGES, max_tokens=60))
    client.until(lambda: client.answer(1).tokens)
    client.send(LoadAdapter(AdapterSource("a", str(folder))))
    client.send(generate(2, messages=MESSAGES, max_tokens=60, adapter="a"))
    assert client.wait(AdapterLoaded, key="a").layers == len(pairs)
    client.send(DropAdapter("a"), generate(3, messages=MESSAGES, adapter="a"))
    client.wait(AdapterDropped, key="a")

    assert client.finish(1).text == plain
    assert client.finish(2).text == adapted
    assert client.wait(Rejected, id=3).status == 404


def test_a_refused_adapter_says_why(client: Client, tmp_path: Path) -> None:
    client.send(LoadAdapter(AdapterSource("x", str(tmp_path / "nowhere"))), DropAdapter("x"))
    assert "is not a folder" in client.wait(AdapterRefused, key="x").reason
    client.wait(AdapterDropped, key="x")


def test_an_adapter_that_trips_the_reader_is_refused_too(client: Client, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"num_layers": [1], "lora_parameters": {"scale": 1.0}}')
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {"x.lora_a": mx.ones((2, 2)), "x.lora_b": mx.ones((2, 2))}
    )
    client.send(LoadAdapter(AdapterSource("x", str(tmp_path))), generate(1, messages=MESSAGES, max_tokens=3))
    assert "could not be read" in client.wait(AdapterRefused, key="x").reason
    assert client.finish(1).tokens == 3


def test_limits_change_in_place(client: Client) -> None:
    client.send(Configure(max_context=5), generate(1, messages=MESSAGES, max_tokens=50))
    assert client.wait(Rejected, id=1).code == "context_length_exceeded"
    client.send(Configure(max_context=0), generate(2, messages=MESSAGES, max_tokens=5))
    assert client.finish(2).tokens == 5


def test_a_lost_runner_takes_its_rows_with_it(shared: EngineChild) -> None:
    client = shared.ready()
    for i in range(3):
        client.send(generate(i, messages=MESSAGES, max_tokens=ENDLESS))
    client.until(lambda: client.answer(0).tokens)
    client.close()

    successor = shared.ready()
    hello = successor.frames[0]
    assert isinstance(hello, Hello)
    assert hello.loaded, "a runner that comes later learns at once that the model is there"
    successor.send(generate(0, messages=MESSAGES, max_tokens=5))
    assert successor.finish(0).tokens == 5, "nothing of the old request 0 is in it"
    assert successor.wait(Stats, rows=0, waiting=0).cancelled_total >= 3
    successor.close()


def test_a_newer_runner_replaces_an_older(shared: EngineChild) -> None:
    older = shared.ready()
    older.send(generate(1, messages=MESSAGES, max_tokens=ENDLESS))
    newer = shared.ready()
    older.until_closed()
    newer.send(generate(1, messages=MESSAGES, max_tokens=5))
    assert newer.finish(1).tokens == 5
    newer.close()


def test_garbage_ends_the_connection_and_nothing_else(shared: EngineChild) -> None:
    client = shared.ready()
    client.socket.sendall(b"\x00\x00\x00\x03abc")
    client.until_closed()
    again = shared.ready()
    again.send(generate(1, messages=MESSAGES, max_tokens=2))
    assert again.finish(1).tokens == 2
    again.close()


def test_costs_nothing_when_idle(client: Client, shared: EngineChild) -> None:
    before_it = client.wait(Stats)
    client.send(generate(1, messages=MESSAGES, max_tokens=3))
    client.finish(1)
    client.wait(Stats, rows=0, completion_tokens_total=before_it.completion_tokens_total + 3)
    process = psutil.Process(shared.process.pid)
    before = process.cpu_times()
    assert not client.receive(timeout=0.5), "an idle engine sends nothing"
    after = process.cpu_times()
    assert (after.user - before.user) + (after.system - before.system) <= 0.01


def test_an_interrupt_is_not_for_the_engine(client: Client, shared: EngineChild) -> None:
    client.send(generate(1, messages=MESSAGES, max_tokens=30))
    os.kill(shared.process.pid, signal.SIGINT)
    assert client.finish(1).tokens == 30


@pytest.mark.parametrize("cores", [FEW, MANY])
def test_left_alone_it_ends(start: Callable[..., EngineChild], cores: int) -> None:
    never_met = start(orphan_grace=0.05, cores=cores)
    left = start(orphan_grace=0.05, cores=cores)
    client = left.connect()
    client.wait(Loaded)
    client.send(generate(1, messages=MESSAGES, max_tokens=ENDLESS))
    client.close()
    assert never_met.exit_code() == 0
    assert left.exit_code() == 0
    assert not left.socket.exists()


def test_a_stale_socket_is_replaced(start: Callable[..., EngineChild], tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "e.sock").write_text("of a process that was killed")
    start().ready().close()


@pytest.mark.parametrize("cores", [FEW, MANY])
def test_shutdown_finishes_what_runs(start: Callable[..., EngineChild], cores: int) -> None:
    child = start(cores=cores)
    client = child.ready()
    client.send(generate(1, messages=MESSAGES, max_tokens=50), generate(2, messages=MESSAGES, max_tokens=60))
    client.until(lambda: client.answer(1).tokens)
    client.send(Shutdown(20.0), generate(3, messages=MESSAGES))
    assert client.wait(Rejected, id=3).code == "shutting_down"
    assert client.finish(1).tokens == 50
    assert client.finish(2).tokens == 60
    client.until_closed()
    assert child.exit_code() == 0


@pytest.mark.parametrize("cores", [FEW, MANY])
def test_requests_that_came_before_a_shutdown_are_read_and_finished(
    start: Callable[..., EngineChild], cores: int
) -> None:
    child = start(cores=cores)
    client = child.ready()
    asked = [generate(i, prompt=LONG, max_tokens=5) for i in range(8)]
    client.send(*asked, Shutdown(20.0), generate(8, prompt=LONG))
    assert [client.finish(i).tokens for i in range(8)] == [5] * 8
    assert client.wait(Rejected, id=8).code == "shutting_down"
    client.until_closed()
    assert child.exit_code() == 0


@pytest.mark.parametrize("cores", [FEW, MANY])
def test_a_request_that_comes_with_a_shutdown_is_told_so(start: Callable[..., EngineChild], cores: int) -> None:
    """Though nothing else keeps the engine from ending."""
    child = start(cores=cores)
    client = child.ready()
    client.send(Shutdown(20.0), generate(1, prompt=LONG))
    assert client.wait(Rejected, id=1).code == "shutting_down"
    assert child.exit_code() == 0


@pytest.mark.parametrize("cores", [FEW, MANY])
@pytest.mark.parametrize("how", ["a shutdown without patience", "a SIGTERM"])
def test_told_to_end_at_once_it_fails_what_runs(start: Callable[..., EngineChild], how: str, cores: int) -> None:
    child = start(cores=cores)
    client = child.ready()
    client.send(generate(1, messages=MESSAGES, max_tokens=ENDLESS))
    client.until(lambda: client.answer(1).tokens)
    if how == "a SIGTERM":
        os.kill(child.process.pid, signal.SIGTERM)
    else:
        client.send(Shutdown(0.0))
    answer = client.finish(1)
    assert (answer.finish_reason, answer.error) == ("error", "the engine is shutting down")
    client.until_closed()
    assert child.exit_code() == 0


@pytest.mark.parametrize("cores", [FEW, MANY])
def test_a_sigterm_ends_an_idle_engine(start: Callable[..., EngineChild], cores: int) -> None:
    child = start(cores=cores)
    client = child.ready()
    client.wait(Stats)
    os.kill(child.process.pid, signal.SIGTERM)
    client.until_closed()
    assert child.exit_code() == 0


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_what_cannot_be_loaded_is_told_and_ends_the_process(
    start: Callable[..., EngineChild], tmp_path: Path, what: str
) -> None:
    if what == "model":
        child = start(path=tmp_path / "empty")
    else:
        child = start(adapters=(AdapterSource("a", str(tmp_path / "empty")),))
    # However late the runner connects, it is told.
    child.until_logged("model cannot be loaded")
    failed = child.connect().wait(LoadFailed)
    assert ("is not a model folder" if what == "model" else "is not a folder") in failed.reason
    assert child.exit_code() == 1
    assert "Traceback" not in child.log.read_text()


def test_with_nobody_to_tell_it_ends_all_the_same(start: Callable[..., EngineChild], tmp_path: Path) -> None:
    assert start(path=tmp_path / "empty", orphan_grace=0.05).exit_code() == 1


@pytest.mark.parametrize("spec", [None, "{", json.dumps({"model": "m"})])
def test_wrong_arguments_are_one_line(tmp_path: Path, spec: str | None) -> None:
    path = tmp_path / "spec.json"
    if spec is not None:
        path.write_text(spec)
    command = [sys.executable, "-m", "runner.engine", "--spec", str(path), "--socket", str(tmp_path / "e.sock")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "engine cannot start" in done.stderr


def test_a_grammar_is_kept_and_a_bad_one_is_refused(client: Client) -> None:
    """The first one is compiled while nothing else keeps the engine awake."""
    grammar = Grammar("regex", "[a-f]{3}", "structured_outputs.regex")
    client.send(generate(1, messages=MESSAGES, max_tokens=20, grammar=grammar))
    answer = client.finish(1)
    assert (len(answer.text), answer.finish_reason) == (3, "stop")
    assert set(answer.text) <= set("abcdef")
    client.send(generate(2, messages=MESSAGES, grammar=Grammar("regex", "(", "structured_outputs.regex")))
    assert client.wait(Rejected).param == "structured_outputs.regex"
