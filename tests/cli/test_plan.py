import asyncio
import json
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.control.scene import Scene


async def test_exit_codes_against_a_runner(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(up.manifest), "--detailed-exitcode"]
    assert await asyncio.to_thread(main, asked) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = up.folder / "other.yaml"
    other.write_text(up.manifest.read_text().replace("gpt-x", "gpt-y"))
    asked[1] = str(other)
    assert await asyncio.to_thread(main, [*asked, "--json"]) == 2
    assert [a["target"] for a in json.loads(capsys.readouterr().out)["actions"]] == ["models.chat"]
    assert await asyncio.to_thread(main, asked[:2]) == 0, "only who asks gets a 2"
    other.write_text("name: dev\nmodels: {chat: {sauce: x}}\n")
    assert await asyncio.to_thread(main, asked) == 1


def test_exit_codes_without_a_runner(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    scene.write("chat: {source: ./models/chat}")
    assert main(["plan", str(scene.manifest)]) == 0
    assert main(["plan", str(scene.manifest), "--detailed-exitcode"]) == 2
    assert main(["plan", str(tmp_path / "none.yaml"), "--detailed-exitcode"]) == 1
