import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.cli import events
from runner.cli.events import render
from runner.cli.main import main
from tests.cli.attach import attached
from tests.control.scene import Scene


async def test_what_happened_in_words(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["events"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    said = [line[21:] for line in lines if "warning: " not in line]
    assert said[0].startswith(("runner: no hard limit for engines", "runner: the kernel holds each engine"))
    assert said[1] == "runner: planned 2 to do: open servers.lm, start models.chat"
    assert f"servers.lm: listening at http://127.0.0.1:{up.port()}" in said
    assert said[-1] == "runner: generation 1 is live"


async def test_json_is_what_the_runner_recorded(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["events", "dev", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == up.events


async def test_following_ends_when_the_runner_has_stopped(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert up.runner is not None
    following = asyncio.create_task(asyncio.to_thread(main, ["events", "-f", "--json"]))
    await attached(up)
    up.write("chat: {source: ./models/chat}")
    await up.event("applied", 2)
    up.runner._stop.set()
    assert await asyncio.wait_for(following, 15) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert seen == up.events
    assert seen[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"event": "engine_died", "target": "models.a", "pid": 7}, "models.a: the engine (pid 7) ended unexpectedly"),
        ({"event": "apply_failed", "error": "wrong\nmend it"},
         "runner: the manifest is not in effect, what ran goes on:\n    wrong\n    mend it"),
        ({"event": "action_done", "action": "replace", "target": "models.a", "disruption": "surge", "seconds": 1.234},
         "models.a: replace done in 1.23 s (surge)"),
        ({"event": "of_a_later_version", "target": "models.a", "reason": "new"},
         "models.a: of a later version reason=new"),
    ],
)  # fmt: skip
def test_words(fields: dict[str, Any], words: str) -> None:
    assert render({"time": 0.0, **fields})[21:] == words


def test_a_look_imports_the_standard_library_only() -> None:
    code = (
        "import sys, runner.cli.main, runner.cli.events, runner.cli.wait, runner.cli.status\n"
        "heavy = {'pydantic', 'yaml', 'falcon', 'asyncio', 'rich', 'msgspec', 'psutil'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


def test_every_event_of_the_runner_has_words() -> None:
    control = Path(events.__file__).parents[1] / "control"
    emitted = {
        name
        for file in control.glob("*.py")
        for name in re.findall(r'(?:emit|_on_event)\(\s*"(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert {"planned", "applied", "engine_died"} <= emitted
    assert emitted <= events._WORDS.keys()
