import os
import shutil
from pathlib import Path

from runner.control.sources import Sources
from runner.plan.digests import DigestCache, adapter_digest, model_digest
from runner.plan.spec import AdapterSpec, ModelSpec
from tests.control.scene import Scene


def spec(scene: Scene) -> ModelSpec:
    cache = DigestCache()
    model, adapter = scene.folder / "models" / "chat", scene.folder / "adapters" / "pirate"
    pirate = AdapterSpec("pirate", adapter, adapter_digest(adapter, cache).digest)
    return ModelSpec("chat", "./m", model, model_digest(model, cache).digest, 1, adapters=(pirate,))


async def test_what_is_as_it_was_and_what_is_not(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.model("chat")
    scene.adapter("pirate")
    planned, sources = spec(scene), Sources()
    assert await sources.changed([planned]) == []
    os.utime(tmp_path / "adapters" / "pirate" / "adapters.safetensors")
    assert await sources.changed([planned]) == [], "an adapter is known by its content"
    scene.adapter("pirate", version=2)
    scene.model("chat", load_seconds=1)
    assert [str(found) for found in await sources.changed([planned])] == [
        f"models.chat.source: the files in {tmp_path}/models/chat changed",
        f"models.chat.adapters.pirate: the files in {tmp_path}/adapters/pirate changed",
    ]
    shutil.rmtree(tmp_path / "adapters" / "pirate")
    (gone,) = await sources.changed_adapters("chat", planned.adapters)
    assert gone.reason.startswith("there is no folder")
