"""The order of a run, with the server in this process and the clients in theirs."""

import asyncio
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest

from runner.bench.job import Job, Load, Target, target_of
from runner.bench.run import Measured, Settings, Subject, calibrate, find_model, measure
from runner.bench.workers import Workers
from runner.errors import RunnerError
from tests.bench.server import Exchange, ScriptedServer, text, three_tokens


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    with Workers(2) as started:
        yield started


def target(server: ScriptedServer) -> Target:
    return Target(host="127.0.0.1", port=server.port, model="m")


async def counting(exchange: Exchange) -> None:
    """A server whose words are three tokens each, after a template of eleven."""
    words = len(exchange.body["messages"][0]["content"].split())
    usage = {"prompt_tokens": 11 + 3 * words, "completion_tokens": 1}
    await exchange.events(text("a", "stop"), {"choices": [], "usage": usage})


async def test_prompts_get_the_length_that_was_asked_for(server: ScriptedServer, workers: Workers) -> None:
    server.behaviour = counting
    settings = Settings(clients=(2,), requests=4, warm_up=0, prompt_tokens=200)
    subject = await asyncio.to_thread(calibrate, workers, target(server), settings)
    assert subject.calibrated
    (measured,) = await asyncio.to_thread(lambda: list(measure(workers, [subject], settings)))
    assert measured.level.prompt_tokens == pytest.approx(200, abs=3)


async def test_a_shared_prefix_is_part_of_that_length(server: ScriptedServer, workers: Workers) -> None:
    server.behaviour = counting
    settings = Settings(clients=(1,), requests=2, warm_up=0, prompt_tokens=200, shared_prefix=100)
    subject = await asyncio.to_thread(calibrate, workers, target(server), settings)
    assert subject.load.shared_words == pytest.approx(subject.load.words, abs=1)


async def test_a_server_without_usage_gets_estimated_prompts(server: ScriptedServer, workers: Workers) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.events(text("a"), text("b", "stop"))

    server.behaviour = silent
    subject = await asyncio.to_thread(calibrate, workers, target(server), Settings(prompt_tokens=100))
    assert not subject.calibrated
    assert subject.load.words == 75


async def test_a_server_that_refuses_stream_options_is_asked_without(server: ScriptedServer, workers: Workers) -> None:
    async def strict(exchange: Exchange) -> None:
        if "stream_options" in exchange.body:
            exchange.json(400, {"error": {"message": "unknown field: stream_options"}})
        else:
            await three_tokens(exchange)

    server.behaviour = strict
    subject = await asyncio.to_thread(calibrate, workers, target(server), Settings())
    assert not subject.target.usage


async def test_a_server_that_fails_at_once_is_an_error_that_says_why(server: ScriptedServer, workers: Workers) -> None:
    async def full(exchange: Exchange) -> None:
        exchange.json(503, {"error": {"message": "the queue is full"}})

    server.behaviour = full
    with pytest.raises(RunnerError, match=r"http_503: the queue is full"):
        await asyncio.to_thread(calibrate, workers, target(server), Settings())


async def test_the_first_model_listed_is_taken(server: ScriptedServer) -> None:
    async def models(exchange: Exchange) -> None:
        exchange.json(200, {"data": [{"id": "one"}, {"id": "two"}]}, "Connection: close")

    server.behaviour = models
    found = await asyncio.to_thread(find_model, target_of(f"127.0.0.1:{server.port}"))
    assert found.model == "one"


async def test_a_server_that_lists_none_is_asked_without_a_model(server: ScriptedServer) -> None:
    async def none(exchange: Exchange) -> None:
        exchange.json(404, {}, "Connection: close")

    server.behaviour = none
    assert not (await asyncio.to_thread(find_model, target_of(f"127.0.0.1:{server.port}"))).model


async def test_a_missing_key_is_named(server: ScriptedServer) -> None:
    async def locked(exchange: Exchange) -> None:
        exchange.json(401, {}, "Connection: close")

    server.behaviour = locked
    with pytest.raises(RunnerError, match="--api-key"):
        await asyncio.to_thread(find_model, target_of(f"127.0.0.1:{server.port}"))


def test_nobody_listens() -> None:
    with pytest.raises(RunnerError, match="does not answer"):
        find_model(target_of("127.0.0.1:1"))


async def test_processes_share_a_level(server: ScriptedServer, workers: Workers) -> None:
    settings = Settings(clients=(5,), requests=23, warm_up=0, processes=2)
    subject = Subject(target(server), server.job().load, True)
    (measured,) = await asyncio.to_thread(lambda: list(measure(workers, [subject], settings)))
    assert (measured.level.requests, measured.level.failed, measured.level.tokens) == (23, 0, 69)
    assert len({e.body["messages"][0]["content"] for e in server.requests}) == 23
    assert server.connections == 5


async def test_two_servers_take_turns(server: ScriptedServer, workers: Workers) -> None:
    async with ScriptedServer() as other:
        settings = Settings(clients=(1, 2), requests=2, warm_up=1, repeat=2)
        load = server.job().load
        subjects = [Subject(target(server), load, True), Subject(target(other), load, True)]
        found: list[Measured] = await asyncio.to_thread(lambda: list(measure(workers, subjects, settings)))
        order = [(m.level.clients, m.repetition, m.subject) for m in found]
        assert order == [(1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0), (2, 0, 0), (2, 0, 1), (2, 1, 1), (2, 1, 0)]
        prompts = [e.body["messages"][0]["content"] for s in (server, other) for e in s.requests]
        assert len(set(prompts)) == len(prompts), "not even the warm-up and two servers share one"


async def test_stopping_ends_the_run_with_what_there_is(server: ScriptedServer, workers: Workers) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    async def hangs(exchange: Exchange) -> None:
        await exchange.events(text("a"), done=False)
        asked.set()
        await exchange.reader.read()

    server.behaviour = hangs
    subject = Subject(target(server), server.job().load, True)
    settings = Settings(clients=(2, 4), warm_up=0)
    running = loop.run_in_executor(None, lambda: list(measure(workers, [subject], settings)))
    await asked.wait()
    workers.stop()
    (measured,) = await running
    assert measured.level.interrupted
    assert measured.level.failed == 0


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("localhost:8080/v1/", "http://localhost:8080/v1"),
        ("https://api.example.com/openai/v1/chat/completions", "https://api.example.com:443/openai/v1"),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
    ],
)
def test_addresses(url: str, printed: str) -> None:
    assert target_of(url).url == printed


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:y"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(RunnerError, match="is no address"):
        target_of(url)


async def test_clients_end_with_whoever_asked_for_them() -> None:
    """A bench that is killed leaves no load behind, and no complaint: its workers' pipes end in the middle of a job."""
    asked = asyncio.Event()

    async def silent(exchange: Exchange) -> None:
        asked.set()
        await asyncio.Event().wait()

    async with ScriptedServer(silent) as server:
        job = Job(target=target(server), load=Load(words=3), clients=2, first=0, end=2)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        worker = await asyncio.create_subprocess_exec(sys.executable, "-m", "runner.bench.worker", **pipes)
        assert worker.stdin is not None
        data = msgspec.msgpack.encode(job)
        worker.stdin.write(len(data).to_bytes(4, "big") + data)
        await asyncio.wait_for(asked.wait(), 30)
        worker._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]  # nobody reads
        worker.stdin.close()
        assert worker.stderr is not None
        assert await asyncio.wait_for(worker.stderr.read(), 30) == b""
        assert await worker.wait() == 0
