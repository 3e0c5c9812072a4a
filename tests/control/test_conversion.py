"""A manifest that asks for quantisation: the copy is made once, whole or not at all, and served."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model

from runner.control.model_status import status_of
from tests.control.asking import text
from tests.control.scene import Scene
from tests.engine.tiny import build_model

pytestmark = pytest.mark.mlx

FOUR_BITS = "chat: {source: ./models/chat, quantization: {bits: 4, layers: {'*.lm_head': {bits: 8}}}}"


def source(scene: Scene, seed: int = 0, **config: Any) -> Path:
    for file in (scene.folder / "models" / "chat").glob("*"):
        file.unlink()
    return build_model(scene.folder / "models" / "chat", seed=seed, config={"torch_dtype": "bfloat16", **config})


def copies(scene: Scene) -> list[Path]:
    return sorted(path for path in (scene.folder / "cache" / "converted").iterdir() if path.name != "converting.lock")


async def stop(scene: Scene) -> None:
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._stop.set()
    await scene.running
    scene.events.clear()


async def test_made_once_and_served(scene: Scene) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    scene.start(engine_command="")
    await scene.event("applied")
    (folder,) = copies(scene)
    config = json.loads((folder / "config.json").read_text())["quantization"]
    assert (config["bits"], config["lm_head"]["bits"]) == (4, 8)
    status = status_of(scene.live.deployments["chat"])
    held = sum(array.nbytes for array in _arrays(folder))
    assert status["weights_bytes"] == held
    assert [e["percent"] for e in scene.events if e["event"] == "converting"][-1] == 100
    assert await text(scene, max_tokens=4, temperature=0)
    await stop(scene)
    scene.start(engine_command="")
    await scene.event("applied")
    assert not [e for e in scene.events if e["event"] == "converting"], "the copy is there"
    assert copies(scene) == [folder]


def _arrays(folder: Path) -> list[Any]:
    from mlx.utils import tree_flatten

    model, _ = load_model(folder)
    return [array for _, array in tree_flatten(model.parameters())]


async def test_an_edit_of_it_is_another_copy_and_another_engine(scene: Scene) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    scene.start()
    await scene.event("applied")
    scene.write(FOUR_BITS.replace("bits: 4", "bits: 6"))
    await scene.event("applied", 2)
    assert len(copies(scene)) == 2
    (action,) = [e["plan"] for e in scene.events if e["event"] == "planned"][-1]["actions"]
    assert action["action"] == "replace"
    assert {"path": "quantization.bits", "change": "changed", "old": 4, "new": 6} in action["changes"]


async def test_another_source_is_another_copy(scene: Scene) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    scene.start()
    await scene.event("applied")
    source(scene, seed=1)
    await scene.event("applied", 2)
    assert len(copies(scene)) == 2


async def test_one_that_cannot_be_made_leaves_nothing_and_says_why(scene: Scene) -> None:
    source(scene)
    scene.write("chat: {source: ./models/chat}")
    scene.start()
    await scene.event("applied")
    scene.write("chat: {source: ./models/chat, quantization: {layers: {'model.*.nothing': false}}}")
    failed = await scene.event("apply_failed")
    assert "model.*.nothing matches no layer" in failed["error"]
    assert copies(scene) == []
    assert scene.live.deployments["chat"].ready, "what ran goes on"


async def test_given_up_halfway_leaves_nothing(scene: Scene) -> None:
    source(scene)
    scene.write(FOUR_BITS)
    running = scene.start()
    await scene.event("converting")
    assert scene.runner is not None
    scene.runner._stop.set()
    await running
    assert copies(scene) == []


async def test_two_that_want_the_same_share_it(scene: Scene) -> None:
    source(scene)
    scene.write(f"{FOUR_BITS}\n{FOUR_BITS.replace('chat:', 'other:')}")
    scene.start()
    await scene.event("applied")
    assert len(copies(scene)) == 1
    assert len([e for e in scene.events if e["event"] == "converted"]) == 1


async def test_no_room_on_the_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    source(scene)
    scene.write(FOUR_BITS)

    class Full:
        free = 1000

    monkeypatch.setattr("runner.control.conversion.shutil.disk_usage", lambda _: Full)
    result = await asyncio.wait_for(scene.start(), 20)
    assert "has 1,000 left" in str(result.error)
    assert copies(scene) == []
