"""What an engine's process is started with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from runner.control import engine_process
from runner.control.backstop import Backstop
from runner.control.engine_process import EngineProcess
from runner.control.state_folder import StateFolder
from runner.environment import PREPARED, engine_environment
from runner.errors import EngineDied
from runner.protocol import EngineSpec

TELL = "import json, os, pathlib; pathlib.Path({!r}).write_text(json.dumps(dict(os.environ)))"


async def environment_of(folder: Path, command: str = "") -> dict[str, str]:
    """Of a process that tells it and ends."""
    state = StateFolder(folder, "dev")
    spec = EngineSpec(model="tiny", path=str(folder), digest="d")
    engine = EngineProcess(spec, state, command, Backstop(state, wanted=False), lambda: None)
    with pytest.raises(EngineDied):
        await engine.start()
    told: dict[str, str] = json.loads((folder / "told").read_text())
    return told


async def test_an_engine_need_not_start_itself_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_DISABLE_COMPILE", "OPENBLAS_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", TELL.format(str(tmp_path / "told"))]
    monkeypatch.setattr(engine_process, "python_module", lambda _: command)
    wanted = engine_environment(os.environ)

    told = await environment_of(tmp_path)

    assert wanted.items() <= told.items()
    assert PREPARED in told


async def test_a_command_of_the_users_finds_out_for_itself(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(TELL.format(str(tmp_path / "told")))

    told = await environment_of(tmp_path, shlex.join([sys.executable, str(script)]))

    assert PREPARED not in told
