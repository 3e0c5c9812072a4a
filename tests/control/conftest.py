import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.control.scene import Scene


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(tmp_path)
    made.model("chat")
    made.adapter("pirate")
    made.adapter("shout", version=2)
    yield made
    await made.end()
    assert not _engines(tmp_path), "no engine is left"


def _engines(folder: Path) -> list[int]:
    """Processes whose command line names this folder."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else []:
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in command and "fake_engine" in command:
                found.append(int(entry.name))
    return found
