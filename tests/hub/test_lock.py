"""The lock file: what it pins, and who is held to it, by the real commands and a hub on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.cli.main import main
from runner.errors import ManifestError
from runner.hub.cache import snapshot
from runner.inspect.files import BadFolder, FileVersion
from runner.machine import Machine
from runner.manifest.inputs import Inputs
from runner.manifest.load import load_manifest
from runner.manifest.lock import read_lock
from runner.plan import pinned
from runner.plan.digests import DigestCache
from runner.plan.resolve import Look, look
from tests.hub.fake_hub import FakeHub, Repo
from tests.inspect.folders import queries, write_llama, write_lora
from tests.plan.folders import GIB, later

MANIFEST = """\
name: dev
servers: {lm: {port: 8080}}
models:
  chat:
    source: org/chat
    draft: {source: ./small}
    adapters: {pirate: {source: org/pirate, revision: main}, from: ./found/*}
"""
Capture = pytest.CaptureFixture[str]


class Desk:
    """A folder with a manifest whose sources are on the hub and beside it."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.folder = folder
        self.manifest = folder / "prod.yaml"
        self.lock = folder / "prod.lock.yaml"
        self.manifest.write_text(MANIFEST)
        write_llama(folder / "made" / "chat", num_hidden_layers=2)
        write_llama(folder / "small", num_hidden_layers=1)
        write_lora(folder / "made" / "pirate", queries(range(2)))
        write_lora(folder / "found" / "shout", queries(range(2)))
        self.chat = hub.repo("org/chat", folder / "made" / "chat")
        hub.repo("org/pirate", folder / "made" / "pirate")

    def look(self, *, frozen: bool = False) -> Look:
        """As `apply` does."""
        loaded = load_manifest(self.manifest, {}, frozen=frozen)
        return look(loaded, Machine(16 * GIB, float32=False), DigestCache(now=later))

    def codes(self, *, frozen: bool = False) -> list[str]:
        """Of what a look finds, of errors and downloads and, where there are none, of the lock's warnings."""
        loaded = load_manifest(self.manifest, {}, frozen=frozen)
        found = look(loaded, Machine(16 * GIB, float32=False), DigestCache(now=later))
        return [d.code for d in (*found.wrong, *found.missing, *loaded.warnings)]

    def locked(self, target: str = "models.chat") -> dict[str, Any]:
        """One entry of the lock file."""
        entry: dict[str, Any] = yaml.safe_load(self.lock.read_text())["sources"][target]
        return entry

    def move(self, repo: Repo) -> str:
        """Another commit on main, with other weights."""
        files = dict(repo.commits[repo.branches["main"]])
        files["model.safetensors"] = files["model.safetensors"][:-1] + b"\5"
        return repo.push(files)


@pytest.fixture
def desk(hub: FakeHub, tmp_path: Path) -> Desk:
    return Desk(tmp_path, hub)


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_what_it_holds(desk: Desk, hub: FakeHub, capsys: Capture) -> None:
    assert run("lock", str(desk.manifest)) == 0
    assert "prod.lock.yaml: 4 sources are locked." in capsys.readouterr().out
    chat = desk.locked()
    assert (chat["source"], chat["commit"]) == ("org/chat", desk.chat.branches["main"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", chat["files"]["model.safetensors"]["digest"])
    assert re.fullmatch(r"git:[0-9a-f]{40}", chat["files"]["config.json"]["digest"])
    assert chat["files"]["config.json"]["size"] == (desk.folder / "made" / "chat" / "config.json").stat().st_size
    assert chat["tokenizer"].startswith("sha256:")
    assert "revision" not in chat
    assert desk.locked("models.chat.adapters.pirate")["revision"] == "main"
    draft, found = desk.locked("models.chat.draft"), desk.locked("models.chat.adapters.shout")
    assert "commit" not in draft
    assert found["source"] == "./found/shout", "the same on every machine"
    assert "tokenizer" not in found
    assert not any("resolve" in asked.path for asked in hub.asked), "nothing is downloaded"
    before = desk.lock.read_text()
    assert run("lock", str(desk.manifest)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert desk.lock.read_text() == before


def test_a_branch_that_moves(desk: Desk, hub: FakeHub, cache: Path, capsys: Capture) -> None:
    first = desk.chat.branches["main"]
    run("lock", str(desk.manifest))
    second = desk.move(desk.chat)
    assert run("pull", str(desk.manifest)) == 0
    assert snapshot(cache, "org/chat", first) is not None
    assert snapshot(cache, "org/chat", second) is None
    assert desk.look().desired.models[0].path.name == first
    run("pull", "org/chat")  # somebody else on this machine moves main on
    assert snapshot(cache, "org/chat", "main") == snapshot(cache, "org/chat", second)
    assert desk.look().desired.models[0].path.name == first
    assert desk.codes(frozen=True) == []
    desk.lock.rename(desk.folder / "away")
    assert desk.look().desired.models[0].path.name == second, "without the lock main is what it is"
    (desk.folder / "away").rename(desk.lock)
    capsys.readouterr()
    assert run("lock", "--upgrade", "chat", "-f", str(desk.manifest)) == 0
    assert f"models.chat: org/chat@{first[:12]} → org/chat@{second[:12]}" in capsys.readouterr().out
    assert desk.look().desired.models[0].path.name == second
    assert desk.codes(frozen=True) == []


@pytest.mark.nightly
def test_upgrades_of_one_model_and_of_all(desk: Desk, hub: FakeHub, capsys: Capture) -> None:
    desk.manifest.write_text(MANIFEST + "  other: {source: org/other, revision: main}\n")
    other = hub.repo("org/other", desk.folder / "made" / "chat")
    run("lock", str(desk.manifest))
    firsts = (desk.locked()["commit"], desk.locked("models.other")["commit"])
    seconds = (desk.move(desk.chat), desk.move(other))
    run("lock", str(desk.manifest))
    assert (desk.locked()["commit"], desk.locked("models.other")["commit"]) == firsts
    run("lock", "--upgrade", "other", "-f", str(desk.manifest))
    assert (desk.locked()["commit"], desk.locked("models.other")["commit"]) == (firsts[0], seconds[1])
    run("lock", "--upgrade", str(desk.manifest))
    assert (desk.locked()["commit"], desk.locked("models.other")["commit"]) == seconds
    capsys.readouterr()
    assert run("lock", "--upgrade", "chta", "-f", str(desk.manifest)) == 1
    assert "no model 'chta'" in capsys.readouterr().err
    assert run("lock", "--check", "--upgrade", "chat", "-f", str(desk.manifest)) == 64


def test_frozen_goes_on_neither_without_the_lock_nor_beyond_it(desk: Desk, capsys: Capture) -> None:
    assert desk.look(frozen=True).wrong[0].code == "E812", "before anything is downloaded"
    run("pull", str(desk.manifest))
    assert desk.codes() == []
    assert desk.codes(frozen=True) == ["E812"], "said once"
    run("lock", str(desk.manifest))
    assert desk.codes(frozen=True) == []
    desk.manifest.write_text(MANIFEST + "  more: {source: org/chat, revision: main}\n")
    assert desk.codes() == ["W811"]
    assert desk.codes(frozen=True) == ["E812"]
    desk.manifest.write_text(MANIFEST.replace("source: org/chat\n", "source: org/chat\n    revision: main\n"))
    assert desk.codes() == ["W811"]
    assert "is org/chat in prod.lock.yaml, and org/chat (main) here" in str(desk.look(frozen=True).wrong[0])
    assert run("validate", str(desk.manifest)) == 0
    assert "[W811]" in capsys.readouterr().err
    assert run("validate", "--strict", str(desk.manifest)) == 1
    assert run("lock", str(desk.manifest)) == 0
    assert desk.codes(frozen=True) == []


def test_a_plan_knows_what_is_to_come(desk: Desk) -> None:
    assert {d.repo: d.bytes_left for d in desk.look().desired.downloads} == {"org/chat": None, "org/pirate": None}
    run("lock", str(desk.manifest))
    for found in desk.look().desired.downloads:
        made = desk.folder / "made" / found.repo.removeprefix("org/")
        assert found.bytes_left == sum(path.stat().st_size for path in made.iterdir())
    run("pull", str(desk.manifest))
    assert desk.look().desired.downloads == ()


def test_a_lock_may_be_larger_than_a_manifest(desk: Desk) -> None:
    run("lock", str(desk.manifest))
    desk.lock.write_text(desk.lock.read_text() + "# more\n" * 200_000)
    inputs = Inputs()
    loaded = load_manifest(desk.manifest, {}, inputs)
    assert loaded.lock is not None
    assert inputs.now() == inputs
    desk.lock.write_text(desk.lock.read_text() + "# another end\n")
    assert inputs.now() != inputs


def test_a_folder_that_changes(desk: Desk) -> None:
    run("pull", str(desk.manifest))
    run("lock", str(desk.manifest))
    config = desk.folder / "small" / "config.json"
    config.write_text(config.read_text().replace("}", ', "more": 1}', 1))
    assert desk.codes() == ["W812"]
    assert desk.codes(frozen=True) == ["E813"]
    write_lora(desk.folder / "found" / "new", queries(range(2)))
    assert desk.codes() == ["W812", "W811"] or desk.codes() == ["W811", "W812"]
    assert sorted(desk.codes(frozen=True)) == ["E812", "E813"]
    run("lock", str(desk.manifest))
    assert desk.codes(frozen=True) == []


def test_a_file_that_cannot_be_read_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pull", str(desk.manifest))
    run("lock", str(desk.manifest))

    def being_written(version: FileVersion, kind: str, cache: DigestCache) -> str:
        raise BadFolder("E603", f"{Path(version.path).name} is being written", incomplete=True)

    monkeypatch.setattr(pinned, "digest_of", being_written)
    assert "W812" in desk.codes(), "no fault of ours, whatever a folder's files do"


def test_a_repository_whose_files_differ_is_an_error_in_any_case(desk: Desk, cache: Path) -> None:
    run("lock", str(desk.manifest))
    run("pull", str(desk.manifest))
    held = snapshot(cache, "org/chat", desk.locked()["commit"])
    assert held is not None
    config = held / "config.json"
    text = config.read_bytes()
    config.resolve().write_bytes(text + b"\n")
    (wrong,) = desk.look().wrong
    assert (wrong.code, wrong.path) == ("E813", "models.chat.source")
    assert "config.json is another" in wrong.message
    assert run("pull", "--verify", str(desk.manifest)) == 0
    assert desk.codes(frozen=True) == []
    weights = held / "model.safetensors"
    other = weights.resolve().with_name("a" * 64)
    other.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(other)
    assert desk.codes() == ["E813"], "told by the blob's name, without reading it"


def test_check_is_for_ci(desk: Desk, cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("lock", "--check", str(desk.manifest)) == 1
    assert "there is no prod.lock.yaml" in capsys.readouterr().out
    run("lock", str(desk.manifest))
    run("pull", str(desk.manifest))
    capsys.readouterr()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # it asks nobody
    assert run("lock", "--check", str(desk.manifest)) == 0
    assert capsys.readouterr().out == "prod.lock.yaml: ok (4 sources)\n"
    held = snapshot(cache, "org/chat", desk.locked()["commit"])
    assert held is not None
    weights = (held / "model.safetensors").resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (desk.folder / "small" / "vocab.txt").write_text("new")
    desk.manifest.write_text(MANIFEST.replace("org/pirate", "org/parrot") + "  more: {source: ./small}\n")
    before = desk.lock.read_text()
    assert run("lock", "--check", "--json", str(desk.manifest)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert {(d["target"], d["message"]) for d in found["differences"]} == {
        ("models.chat", "in the hub's cache model.safetensors is another"),
        ("models.chat.draft", "vocab.txt is new"),
        ("models.chat.adapters.pirate", "is org/pirate (main) in the lock, and org/parrot (main) in the manifest"),
        ("models.more", "is not in the lock"),
    }
    assert desk.lock.read_text() == before


def test_offline_the_cache_is_asked(desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pull", str(desk.manifest))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("lock", str(desk.manifest)) == 0
    offline = desk.lock.read_text()
    desk.lock.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert run("lock", str(desk.manifest)) == 0
    assert desk.lock.read_text() == offline, "the hub says the same"
    desk.manifest.write_text(MANIFEST.replace("org/pirate", "org/parrot"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("lock", str(desk.manifest)) == 1
    assert "[E801]" in capsys.readouterr().err
    assert desk.lock.read_text() == offline


def test_a_repository_that_is_not_there_keeps_the_old_lock(desk: Desk, capsys: Capture) -> None:
    run("lock", str(desk.manifest))
    before = desk.lock.read_text()
    desk.manifest.write_text(MANIFEST.replace("org/pirate", "org/none"))
    assert run("lock", str(desk.manifest)) == 1
    assert "models.chat.adapters.pirate.source: org/none (main)" in capsys.readouterr().err
    assert desk.lock.read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        "<<<<<<< ours\nversion: 1\n", "version: 2\nsources: {}\n", "[]", "", "version: 1\n",
        "version: 1\nsources: [a]\n",
        "version: 1\nsources: {models.chat: {source: org/chat, commit: main, files: {}}}\n",
        "version: 1\nsources: {models.chat: {source: org/chat, files: {a: {size: 1, digest: md5:0}}}}\n",
        "version: 1\nsources: {models.chat: {source: org/chat, files: {a: {size: .inf, digest: md5:0}}}}\n",
        "version: 2026-13-45\n", "version: [2]\n", "[" * 100_000,
    ],
)  # fmt: skip
def test_a_lock_that_cannot_be_used(desk: Desk, text: str) -> None:
    desk.lock.write_text(text)
    with pytest.raises(ManifestError) as caught:
        load_manifest(desk.manifest, {})
    assert [d.code for d in caught.value.diagnostics] == ["E811"]


def test_it_is_that_of_the_last_file_and_is_watched(desk: Desk) -> None:
    overlay = desk.folder / "big.yaml"
    overlay.write_text("models: {chat: {batching: {max_rows: 4}}}\n")
    inputs = Inputs()
    loaded = load_manifest([desk.manifest, overlay], {}, inputs)
    assert loaded.lock is None
    assert inputs.files[desk.folder / "big.lock.yaml"] is None
    run("lock", "-f", str(desk.manifest), "-f", str(overlay))
    assert inputs.now() != inputs
    lock = read_lock([desk.manifest, overlay], inputs)
    assert lock is not None
    assert len(lock.sources) == 4
    assert not desk.lock.exists()
