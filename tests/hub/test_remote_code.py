"""Code of a repository: it comes by consent alone, is pinned like the weights, and a change of it is a change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.hub.cache import snapshot
from tests.control.asking import pid, text
from tests.control.scene import Scene
from tests.engine.tiny import bring_code, build_model
from tests.hub.fake_hub import FakeHub
from tests.hub.test_lock import Desk
from tests.inspect.folders import write_llama

Capture = pytest.CaptureFixture[str]
TRUSTED = "    trust_remote_code: true\n"


@pytest.fixture
def desk(hub: FakeHub, tmp_path: Path) -> Desk:
    """A manifest whose model brings its architecture as code, and does not say that it may."""
    desk = Desk(tmp_path, hub)
    folder = write_llama(desk.folder / "made" / "own", model_file="own_model.py")
    (folder / "own_model.py").write_text("import own_parts")
    (folder / "own_parts.py").write_text("")
    desk.chat = hub.repo("org/chat", folder)
    return desk


def trust(desk: Desk) -> None:
    desk.manifest.write_text(desk.manifest.read_text().replace("    draft:", f"{TRUSTED}    draft:"))


def cached(cache: Path) -> set[str]:
    """The Python files of the repository that are in the cache."""
    held = snapshot(cache, "org/chat", "main")
    return set() if held is None else {path.name for path in held.glob("*.py")}


def test_it_comes_with_consent_and_stays_away_without(desk: Desk, cache: Path, capsys: Capture) -> None:
    assert main(["pull", str(desk.manifest)]) == 0
    assert cached(cache) == set()
    assert desk.codes() == ["E613"]
    trust(desk)
    assert desk.codes() == ["E604"], "the code is still to be fetched"
    assert [d.code for d in desk.look().desired.downloads if d.repo == "org/chat"] == [True]
    assert main(["pull", str(desk.manifest)]) == 0
    assert cached(cache) == {"own_model.py", "own_parts.py"}
    assert desk.codes() == []
    capsys.readouterr()
    assert main(["validate", "--strict", str(desk.manifest)]) == 1
    assert (
        "models.chat.trust_remote_code: the Python code that org/chat brings runs with all" in capsys.readouterr().err
    )


def test_a_lock_has_its_digests_and_keeps_the_commit_when_consent_changes(
    desk: Desk, cache: Path, capsys: Capture
) -> None:
    assert main(["pull", str(desk.manifest)]) == 0
    assert main(["lock", str(desk.manifest)]) == 0
    before = desk.locked()
    assert not [name for name in before["files"] if name.endswith(".py")]
    trust(desk)
    desk.move(desk.chat)
    assert main(["lock", "--check", str(desk.manifest)]) == 1
    assert "models.chat: the lock does not have its Python files" in capsys.readouterr().out
    assert desk.codes()[:1] == ["E604"]
    assert main(["pull", str(desk.manifest)]) == 0
    assert desk.codes() == ["W811"]
    assert desk.codes(frozen=True) == ["E812"]
    assert main(["lock", str(desk.manifest)]) == 0
    assert "with its Python files" in capsys.readouterr().out
    after = desk.locked()
    assert after["commit"] == before["commit"], "a consent moves no branch"
    assert after["trust_remote_code"] is True
    assert set(after["files"]) - set(before["files"]) == {"own_model.py", "own_parts.py"}
    assert after["files"]["own_model.py"]["digest"].startswith("git:")
    assert desk.codes(frozen=True) == []
    assert main(["lock", "--check", str(desk.manifest)]) == 0
    held = snapshot(cache, "org/chat", after["commit"])
    assert held is not None
    (held / "own_parts.py").resolve().write_bytes(b"import os")
    assert desk.codes() == ["E813"], "what runs is what was locked"
    desk.manifest.write_text(desk.manifest.read_text().replace(TRUSTED, ""))
    assert main(["lock", "--check", str(desk.manifest)]) == 1
    assert main(["lock", str(desk.manifest)]) == 0
    assert desk.locked() == before


@pytest.fixture
async def scene(hub: FakeHub, tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    assert scene.runner is not None
    await scene.end()


@pytest.mark.mlx
async def test_from_the_hub_to_an_answer(scene: Scene, hub: FakeHub, tmp_path: Path, cache: Path) -> None:
    """A consent is what makes the difference, and giving it is another engine."""
    folder = build_model(tmp_path / "made")
    hub.repo("org/plain", folder)
    hub.repo("org/chat", bring_code(folder, tokenizer=False))
    scene.write("chat: {source: org/plain}")
    scene.start(engine_command="")
    await scene.event("applied")
    plain, process = await text(scene, max_tokens=8), pid(scene)
    scene.write("chat: {source: org/chat}")
    refused = await scene.event("apply_failed")
    assert "own_model.py" in refused["error"]
    assert "trust_remote_code: true" in refused["error"]
    assert cached(cache) == set()
    assert (await text(scene, max_tokens=8), pid(scene)) == (plain, process)
    scene.write("chat: {source: org/chat, trust_remote_code: true}")
    await scene.event("applied", 2)
    assert cached(cache) == {"own_model.py"}
    assert pid(scene) != process
    assert await text(scene, max_tokens=8) != plain
