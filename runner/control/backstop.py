"""What holds if an engine takes far more memory than it may, faster than its own watchdog looks.

Where control groups can be had (`runner.control.cgroup`), each engine is in one of its own whose limit the kernel
enforces: it ends the engine, and nothing else. Elsewhere engines tell the kernel to end them first when the machine is
out of memory (`runner.engine.oom`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any, Final

from runner.control.cgroup import Group, NoGroup, ground, prepare
from runner.control.state_folder import StateFolder
from runner.machine import cpu_backend

logger = logging.getLogger(__name__)

_BESIDE: Final = 512 * 2**20
"""Bytes of a process beside what its limit counts: Python, MLX's libraries, and a C++ compiler that MLX may start."""

_END: Final = 1.0
_LOOK: Final = 0.02
"""Seconds that groups get to be empty once their engines have been ended, and between two looks."""


def hard_limit(limit: int) -> int:
    """Bytes at which the kernel ends an engine that may use `limit`; 0 for none. The engine ends itself at 1.25 times
    its limit (`runner.engine.watchdog`), so this is for what comes between two looks. Loading passes by 1.1 times the
    weights (MLX's own count: 1.45, of bfloat16 that becomes float32)."""
    return limit + limit // 2 + _BESIDE if limit else 0


class Backstop:
    """One for all engines of a runner. `wanted` False makes no groups (`MLX_RUN_CGROUPS=false`).

    `e/ID.group` in the state folder says where an engine's group is until it is removed, so that what a killed runner
    left behind is found, wherever the next one runs.
    """

    def __init__(self, folder: StateFolder, *, wanted: bool) -> None:
        self._folder = folder
        self._wanted = wanted
        self._base: Path | None = None
        self._used: set[str] = set()
        self._why = "not looked at yet"

    def open(self) -> dict[str, Any]:
        """Find out what can be had, and clear what an earlier runner left. Returns `as_json`."""
        self._sweep()
        try:
            self._base = self._prepared()
        except NoGroup as error:
            self._why = str(error)
        return self.as_json

    def _prepared(self) -> Path:
        if not self._wanted:
            raise NoGroup("turned off by MLX_RUN_CGROUPS")
        if sys.platform == "linux" and not cpu_backend():
            raise NoGroup("control groups do not count a GPU's memory")
        found = ground()
        prepare(found)
        return found.base

    @property
    def as_json(self) -> dict[str, Any]:
        """What holds: `kind` is cgroup, oom_score_adj or none; `path` is where groups are made, and `reason` why there
        are none."""
        if self._base is not None:
            return {"kind": "cgroup", "path": str(self._base), "reason": ""}
        return {"kind": "oom_score_adj" if sys.platform == "linux" else "none", "path": "", "reason": self._why}

    def enclose(self, engine_id: str, limit: int) -> Group | None:
        """A group for an engine that is about to be started and may use `limit` bytes; None where there are none."""
        self._sweep()
        if self._base is None:
            return None
        path = self._base / _name(engine_id)
        self._used.add(engine_id)
        try:
            self._folder.engine_group(engine_id).write_text(str(path), encoding="utf-8")
            group = Group.make(path)
        except OSError as error:
            logger.warning("no control group for an engine", extra={"path": str(path), "error": str(error)})
            self.release(engine_id)
            return None
        group.allow(hard_limit(limit))
        return group

    def found(self, engine_id: str) -> Group | None:
        """The group of an engine that an earlier runner started."""
        try:
            group = Group(Path(self._folder.engine_group(engine_id).read_text(encoding="utf-8")))
        except OSError:
            return None
        self._used.add(engine_id)
        return group

    def release(self, engine_id: str) -> None:
        """An engine has ended, or is about to."""
        self._used.discard(engine_id)
        self._sweep()

    async def close(self) -> None:
        """All engines have been ended: wait for what is left of them."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _END
        while self._sweep() and loop.time() < until:  # noqa: ASYNC110 - nobody tells when a group is empty
            await asyncio.sleep(_LOOK)

    def _sweep(self) -> int:
        """Remove the groups of engines that have ended. Returns how many are not empty yet."""
        left = 0
        for engine_id in self._folder.engine_groups():
            if engine_id in self._used:
                continue
            record = self._folder.engine_group(engine_id)
            try:
                path = Path(record.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                path = Path()
            if path.name != _name(engine_id) or Group(path).remove():
                record.unlink(missing_ok=True)
            else:
                left += 1
        return left


def _name(engine_id: str) -> str:
    return f"mlx-run-{engine_id}"
