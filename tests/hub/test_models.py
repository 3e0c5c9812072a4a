"""`mlx-run models`: what is here, what the hub has, and making room, with a hub on loopback."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.control import copies
from runner.hub.cache import snapshot
from runner.hub.store import leftovers, stored
from runner.hub.transfer import PARTIAL
from runner.plan.available import parameters, quantization
from runner.plan.candidates import examine
from runner.plan.digests import DigestCache
from tests.hub.fake_hub import FakeHub
from tests.inspect.folders import queries, write_llama, write_lora

Capture = pytest.CaptureFixture[str]
MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


@pytest.fixture
def folder(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three repositories on the hub, and a manifest that names one of them and a folder."""
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    write_llama(tmp_path / "made", num_hidden_layers=2)
    write_llama(tmp_path / "small", num_hidden_layers=1, quantization={"bits": 4, "group_size": 64})
    write_lora(tmp_path / "pirate", queries(range(2)))
    hub.repo("org/chat", tmp_path / "made")
    hub.repo("org/other", tmp_path / "made")
    hub.repo("org/pirate", tmp_path / "pirate")
    hub.repo("org/chat-gguf").push({"config.json": b"{}", "chat.gguf": b"x"})
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels:\n"
    text += "  chat: {source: org/chat, adapters: {pirate: org/pirate}}\n  small: {source: ./small}\n"
    (tmp_path / "dev.yaml").write_text(text)
    return tmp_path


def run(*arguments: str) -> int:
    return main(["models", *arguments])


def pull(*names: str) -> None:
    for name in names:
        assert main(["pull", name]) == 0


def asked(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    assert run("--json", *arguments) == 0 if arguments[:1] == ("list",) else run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_here(folder: Path, hub: FakeHub, cache: Path, capsys: Capture) -> None:
    assert run() == 0
    assert "There are no models in" in capsys.readouterr().out
    pull("org/other", str(folder / "dev.yaml"))
    found = asked(capsys, "list", "-f", str(folder / "dev.yaml"))["models"]
    by_source = {one["source"]: one for one in found}
    assert list(by_source) == ["org/chat", "org/other", "org/pirate", str(folder / "small")]
    chat, small = by_source["org/chat"], by_source[str(folder / "small")]
    assert (chat["kind"], chat["architecture"], chat["refs"]) == ("model", "llama", ["main"])
    assert chat["commit"] == hub.repos["org/chat"].branches["main"]
    assert chat["used_by"] == ["dev.yaml: models.chat"]
    assert chat["size"] == sum(path.stat().st_size for path in (folder / "made").iterdir())
    assert chat["parameters"] > 0
    assert time.time() - chat["used"] < 3600
    assert (small["commit"], small["used_by"]) == ("", ["dev.yaml: models.small"])
    assert small["quantization"] == "4 bit, groups of 64"
    assert by_source["org/other"]["used_by"] == []
    assert by_source["org/pirate"]["kind"] == "adapter"
    assert run("list", "-f", str(folder / "dev.yaml")) == 0
    assert "org/chat@main" in capsys.readouterr().out


def test_parameters_are_counted_packed_or_not(tmp_path: Path) -> None:
    """demo-chat as it is, and the same quantised by mlx-lm's layout: the numbers that pack, not the words."""
    facts = examine(MODELS / "demo-chat", DigestCache(), source="demo-chat").facts
    assert facts is not None
    assert parameters(facts) == sum(group.values for group in facts.tensors)
    write_llama(tmp_path / "plain", num_hidden_layers=2)
    write_llama(tmp_path / "packed", num_hidden_layers=2, quantization={"bits": 4, "group_size": 64})
    plain, packed = (examine(tmp_path / name, DigestCache(), source=name).facts for name in ("plain", "packed"))
    assert plain is not None
    assert packed is not None
    assert parameters(packed) == parameters(plain)
    assert quantization(packed) == "4 bit, groups of 64"
    assert quantization(plain) in ("bf16", "f16", "f32")


def test_a_search_says_what_fits(folder: Path, hub: FakeHub, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/other"].claimed["model.safetensors"] = 2**60
    pull("org/chat")
    found = {match["repo"]: match for match in asked(capsys, "search", "org")}
    assert set(found) == {"org/chat", "org/other", "org/pirate", "org/chat-gguf"}
    weights = len(hub.repos["org/chat"].commits[found["org/chat"]["commit"]]["model.safetensors"])
    assert (found["org/chat"]["weights_bytes"], found["org/chat"]["fits"], found["org/chat"]["here"]) == (
        weights,
        True,
        True,
    )
    assert (found["org/other"]["fits"], found["org/other"]["why"]) == (False, "does not fit")
    assert "holds no model*.safetensors, but chat.gguf" in found["org/chat-gguf"]["why"]
    assert run("search", "chat", "gguf") == 0
    assert "no: " in capsys.readouterr().out
    assert run("search", "nothing-of-the-kind") == 0
    assert "The hub has nothing" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("search", "chat") == 1
    assert "[E801]" in capsys.readouterr().err
    assert run("search") == 64


def test_one_of_them(folder: Path, hub: FakeHub, capsys: Capture) -> None:
    shown = asked(capsys, "show", "org/chat")
    assert (shown["here"], shown["commit"]) == (False, hub.repos["org/chat"].branches["main"])
    assert "model.safetensors" in {file["name"] for file in shown["files"]}
    pull("org/chat")
    shown = asked(capsys, "show", "org/chat")
    assert (shown["source"], shown["verdict"]["fits"], shown["architecture"]) == ("org/chat", True, "llama")
    assert asked(capsys, "show", f"org/chat@{shown['commit'][:8]}")["commit"] == shown["commit"]
    assert asked(capsys, "show", str(folder / "pirate"))["kind"] == "adapter"
    assert run("show", "org/chat") == 0
    assert "requests of" in capsys.readouterr().out
    assert run("show", "org/none") == 1
    assert "[E803]" in capsys.readouterr().err


def test_one_commit_of_two_is_removed_with_what_only_it_has(folder: Path, hub: FakeHub, cache: Path) -> None:
    repo = hub.repos["org/other"]
    first = repo.branches["main"]
    pull("org/other")
    files = dict(repo.commits[first])
    second = repo.push({**files, "model.safetensors": files["model.safetensors"][:-1] + b"\1"})
    pull("org/other")
    assert {held.commit for held in stored(cache)} == {first, second}
    assert run("rm", "--yes", f"org/other@{first}") == 0
    (left,) = stored(cache)
    assert (left.commit, left.refs) == (second, ("main",))
    whole = snapshot(cache, "org/other", "main")
    assert whole is not None
    assert all(path.exists() for path in whole.iterdir())
    assert len(list((cache / "models--org--other" / "blobs").iterdir())) == len(list(whole.iterdir()))
    assert run("rm", "--yes", "org/other") == 0
    assert not (cache / "models--org--other").exists()
    assert run("rm", "--yes", "org/other") == 1
    assert run("rm", "--yes", str(folder / "small")) == 1
    assert (folder / "small" / "config.json").exists(), "folders are not ours to remove"


def test_prune_keeps_what_manifests_and_locks_ask_for(
    folder: Path, hub: FakeHub, cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(folder / "dev.yaml")
    pull(file, "org/other")
    assert main(["lock", file]) == 0
    repo = hub.repos["org/chat"]
    first = repo.branches["main"]
    repo.push({**repo.commits[first], "generation_config.json": b"{}"})
    pull("org/chat")
    partial = cache / "models--org--other" / "blobs" / f"{'a' * 64}{PARTIAL}"
    partial.write_bytes(b"x" * 10)
    assert leftovers(cache) == []
    os.utime(partial, (1, 1))
    assert leftovers(cache) == [partial]
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert run("prune", "-f", file) == 64, "nobody is there to ask"
    capsys.readouterr()
    would = asked(capsys, "prune", "--dry-run", "-f", file)
    assert {name.partition("@")[0] for name in would["would_remove"]} == {"org/other", "org/chat"}
    assert partial.exists()
    assert run("prune", "--yes", "-f", file) == 0
    assert {(held.repo, held.commit) for held in stored(cache)} == {
        ("org/chat", first),
        ("org/pirate", hub.repos["org/pirate"].branches["main"]),
    }, "the locked commit stays, though main has moved on"
    assert not partial.exists()
    assert run("prune", "--yes", "-f", file) == 0
    assert "Nothing to remove" in capsys.readouterr().out


def test_what_an_engine_has_loaded_stays(folder: Path, cache: Path, capsys: Capture) -> None:
    pull("org/other")
    held = snapshot(cache, "org/other", "main")
    assert held is not None
    loaded = copies.hold(held)
    assert loaded is not None
    assert run("rm", "--yes", "org/other") == 1
    assert "org/other is used by an engine" in capsys.readouterr().err
    assert run("prune", "--yes") == 0
    assert f"note: {held} stays: an engine uses it" in capsys.readouterr().err
    assert held.is_dir()
    os.close(loaded)
    assert run("rm", "--yes", "org/other") == 0


def test_what_is_being_fetched_is_not_removed(folder: Path, hub: FakeHub, cache: Path, capsys: Capture) -> None:
    pull("org/other")
    repo = hub.repos["org/other"]
    files = repo.commits[repo.branches["main"]]
    repo.push({**files, "a.json": b"{}", "model.safetensors": files["model.safetensors"][:-1] + b"\1"})
    hold = threading.Event()
    hub.fault("model.safetensors", hold=hold)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(main, ["pull", "org/other"])
        while len(hub.fetched("a.json")) < 1 or len(hub.fetched("model.safetensors")) < 2:
            time.sleep(0.01)
        assert run("prune", "--yes") == 1
        assert "being fetched" in capsys.readouterr().err
        hold.set()
        assert pulling.result() == 0
    held = snapshot(cache, "org/other", "main")
    assert held is not None
    assert (held / "a.json").read_bytes() == b"{}"
    assert run("prune", "--yes") == 0
    assert list(stored(cache)) == []


def test_prune_does_nothing_while_a_manifest_cannot_be_read(folder: Path, cache: Path, capsys: Capture) -> None:
    pull("org/other")
    (folder / "dev.yaml").write_text("name: [")
    assert run("prune", "--yes", "-f", str(folder / "dev.yaml")) == 1
    assert "not all manifests can be read" in capsys.readouterr().err
    assert snapshot(cache, "org/other", "main") is not None
