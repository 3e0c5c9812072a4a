"""Quantised copies that nothing uses go, and no others: by real conversions, real engines, and the real command."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.control import copies
from runner.control.copies import CONVERTING, PARTIAL, Copy
from tests.control.asking import text
from tests.control.scene import Scene
from tests.control.test_conversion import FOUR_BITS, source

Capture = pytest.CaptureFixture[str]
SIX_BITS = FOUR_BITS.replace("bits: 4", "bits: 6")


def made(folder: Path, name: str = "aaaa-affine4") -> Path:
    """A copy, for whoever only looks at its folder."""
    (folder / name).mkdir(parents=True)
    (folder / name / "model.safetensors").write_bytes(b"x" * 100)
    return folder / name


def test_one_that_is_held_stays_and_the_others_go(tmp_path: Path) -> None:
    first, second = made(tmp_path), made(tmp_path, "bbbb-mxfp44")
    copies.note(second, "org/chat")
    size = (second / "made-of.json").stat().st_size
    assert list(copies.copies(tmp_path)) == [Copy(first, "", 100), Copy(second, "org/chat", 100 + size)]
    held = copies.hold(first)
    assert held is not None
    also = copies.hold(first)
    assert also is not None, "holding is shared"
    for descriptor in (held, also):
        assert copies.is_held(first)
        assert not copies.remove(first)
        os.close(descriptor)
    assert not copies.is_held(first)
    assert copies.remove(first)
    assert not first.exists()
    assert copies.hold(first) is None
    assert [copy.folder for copy in copies.copies(tmp_path)] == [second]
    assert list(copies.copies(tmp_path / "nothing")) == []


def test_what_is_being_removed_cannot_be_held(tmp_path: Path) -> None:
    folder = made(tmp_path)
    with copies._alone(folder) as alone:
        assert alone
        assert copies.hold(folder) is None


def test_what_was_cut_off_is_swept_unless_somebody_converts(tmp_path: Path) -> None:
    whole = made(tmp_path)
    half = made(tmp_path, f"cccc-affine4{PARTIAL}")
    settings = tmp_path / f"cccc-affine4{PARTIAL}.json"
    settings.write_text("{}")
    gone = made(tmp_path, "dddd-affine4.17.removed")
    assert copies.leftovers(tmp_path) == [half, settings, gone]
    with (tmp_path / CONVERTING).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert copies.leftovers(tmp_path) == []
        copies.sweep(tmp_path)
        assert half.exists()
    copies.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, tmp_path / CONVERTING]


class Shell:
    """The command, beside a runner in this process."""

    def __init__(self, scene: Scene, capsys: Capture) -> None:
        self.scene = scene
        self._capsys = capsys

    async def models(self, *arguments: str) -> Any:
        self._capsys.readouterr()
        assert await asyncio.to_thread(main, ["models", *arguments, "--json"]) == 0
        return json.loads(self._capsys.readouterr().out)

    async def used_by(self) -> dict[str, list[str]]:
        found = (await self.models("list"))["models"]
        return {Path(one["folder"]).name.partition("-")[2]: one["used_by"] for one in found if one["kind"] == "copy"}


@pytest.fixture
def shell(scene: Scene, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(scene.folder / "state"))
    monkeypatch.setenv("MLX_RUN_CACHE_DIR", str(scene.folder / "cache"))
    monkeypatch.setenv("HF_HOME", str(scene.folder / "hf"))
    return Shell(scene, capsys)


@pytest.mark.mlx
async def test_an_old_copy_goes_and_those_in_use_stay(scene: Scene, shell: Shell, capsys: Capture) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    scene.start(engine_command="")
    await scene.event("applied")
    assert await shell.used_by() == {"affine4": ["dev: models.chat", "dev.yaml: models.chat"]}
    assert (await shell.models("prune", "--yes"))["removed"] == []
    scene.write(SIX_BITS)
    await scene.event("applied", 2)
    await scene.live.settle()  # the old engine has ended
    assert await shell.used_by() == {"affine4": [], "affine6": ["dev: models.chat", "dev.yaml: models.chat"]}
    converted = scene.folder / "cache" / "converted"
    (old,) = converted.glob("*-affine4")
    would = await shell.models("prune", "--dry-run")
    assert would == {"removed": [], "would_remove": [str(old)], "bytes": 0}
    size = copies.size_of(old)
    assert await asyncio.to_thread(main, ["models", "prune", "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"{old.name}, a copy of ./models/chat" in said
    assert not old.exists()
    assert size > 1000
    assert list(await shell.used_by()) == ["affine6"]
    assert await text(scene, max_tokens=4)
    scene.write(FOUR_BITS)
    await scene.event("applied", 3)
    assert old.is_dir(), "what is needed again is made again"


@pytest.mark.mlx
async def test_one_that_an_engine_has_loaded_stays_whoever_knows_of_it(
    scene: Scene, shell: Shell, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    scene.start(engine_command="")
    await scene.event("applied")
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(scene.folder / "of-nobody"))
    assert await shell.used_by() == {"affine4": []}
    (copy,) = (scene.folder / "cache" / "converted").glob("*-affine4")
    assert await asyncio.to_thread(main, ["models", "prune", "--yes"]) == 0
    assert f"note: {copy} stays: an engine uses it" in capsys.readouterr().err
    assert copy.is_dir()
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._stop.set()
    await scene.running
    assert (await shell.models("prune", "--yes"))["removed"] == [str(copy)]
    assert not copy.exists()


@pytest.mark.mlx
async def test_one_that_goes_between_its_making_and_its_loading_is_made_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner holds what it has looked up; what went just before that is not there."""
    source(scene)
    scene.write(FOUR_BITS)
    hold, gone = copies.hold, []

    def too_late(folder: Path) -> int | None:
        if folder.is_dir() and not gone:
            gone.append(folder)
            shutil.rmtree(folder)
        return hold(folder)

    monkeypatch.setattr("runner.control.conversion.hold", too_late)
    scene.start()
    await scene.event("applied")
    assert len(gone) == 1
    assert gone[0].is_dir()
    assert len([event for event in scene.events if event["event"] == "converted"]) == 2


async def test_a_manifest_whose_copy_is_not_known_keeps_all(scene: Scene, shell: Shell, capsys: Capture) -> None:
    source(scene)
    copy = made(scene.folder / "cache" / "converted")
    scene.write("chat: {source: ./models/gone, quantization: {bits: 4}}")
    arguments = ["models", "prune", "--yes", "-f", str(scene.manifest)]
    assert await asyncio.to_thread(main, arguments) == 1
    said = capsys.readouterr().err
    assert "dev.yaml has models.chat, which cannot be used, so its copy is not known" in said
    assert copy.is_dir()
