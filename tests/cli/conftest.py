from pathlib import Path

import pytest

from tests.control.conftest import scene as _scene
from tests.control.scene import Scene

scene = _scene


@pytest.fixture
async def up(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A runner named dev that serves `chat`, in this process; the commands find it."""
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    scene.write("chat: {source: ./models/chat, aliases: [gpt-x]}")
    scene.start()
    await scene.event("applied")
    return scene
