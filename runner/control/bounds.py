"""The hard limit of one engine: a control group that follows what the engine was told to keep to."""

from __future__ import annotations

from runner.control.backstop import Backstop, hard_limit
from runner.control.cgroup import Group
from runner.protocol import EngineSpec


class Bounds:
    """Before `enclose` or `found`, and where no groups can be had, nothing is bounded."""

    def __init__(self, backstop: Backstop) -> None:
        self._backstop = backstop
        self._group: Group | None = None
        self._id = ""
        self._fixed = 0
        self._last: int | None = None

    def enclose(self, engine_id: str, spec: EngineSpec) -> str:
        """Make a group for an engine that is about to be started. Returns its folder, "" where there is none."""
        self._id = engine_id
        self._group = self._backstop.enclose(engine_id, _least(spec.memory_limit_bytes, spec.budget_bytes))
        self._fixed = spec.memory_limit_bytes
        return str(self._group.path) if self._group is not None else ""

    def found(self, engine_id: str, spec: EngineSpec) -> None:
        """The group of an engine that is there already."""
        self._id = engine_id
        self._group = self._backstop.found(engine_id)
        self._fixed = spec.memory_limit_bytes

    def told(self, budget: int) -> None:
        """The engine is about to be told of another budget, in bytes. More is allowed at once; less once it says that
        it keeps to it, for the kernel would not wait until what is too much has been given back."""
        self._last = _least(self._fixed, budget)
        hard = hard_limit(self._last)
        if self._group is not None and (not hard or hard >= (self._group.limit or hard + 1)):
            self._group.allow(hard)

    def kept_to(self, budget: int) -> None:
        """The engine says what it keeps to."""
        kept = _least(self._fixed, budget)
        if self._group is not None and self._last in (None, kept):
            self._group.allow(hard_limit(kept))

    def limit_of(self, pid: int | None) -> int:
        """Bytes at which the kernel ends the engine, 0 where it does not, or the engine has not entered its group."""
        if self._group is None or not self._group.limit or pid is None or not self._group.holds(pid):
            return 0
        return self._group.limit

    @property
    def broken(self) -> str:
        """What is to be said where the kernel has ended what was in the group; empty where it has not."""
        if self._group is None or not self._group.kills:
            return ""
        if self._group.was_full:
            return f"the kernel ended the engine: it reached {self._group.limit:,} bytes, its control group's limit"
        return "the kernel ended the engine because the machine, or the group it runs in, was out of memory"

    def release(self) -> None:
        """The engine has ended."""
        if self._group is not None:
            self._backstop.release(self._id)


def _least(*limits: int) -> int:
    return min((limit for limit in limits if limit), default=0)
