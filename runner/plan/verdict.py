"""Whether a model can be served on this machine alone. Imports little: a runner judges what a search found, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from runner.hub.download import Match
from runner.hub.jobs import File
from runner.hub.needs import is_weights
from runner.machine import Machine

LIMIT_PERCENT: Final = 75
"""Of the machine's memory, for all models together; the rest is left to everything else (and to the GPU's driver)."""


class Verdict(NamedTuple):
    """Whether a model can be served here alone. `needed` are bytes of its weights, `why` is for people."""

    fits: bool
    needed: int
    why: str


class Found(NamedTuple):
    """A repository that a search found. `here`: some commit of it is in the hub's cache."""

    match: Match
    verdict: Verdict
    here: bool

    @property
    def as_json(self) -> dict[str, Any]:
        """As plain data; sizes are bytes."""
        match = self.match
        return {
            "repo": match.repo,
            "commit": match.commit,
            "kinds": list(match.kinds),
            "downloads": match.downloads,
            "likes": match.likes,
            "gated": match.gated,
            "bytes": sum(file.size for file in match.files),
            "weights_bytes": self.verdict.needed,
            "fits": self.verdict.fits,
            "why": self.verdict.why,
            "here": self.here,
        }


def budget(machine: Machine) -> int:
    """Bytes that models may have there."""
    return machine.memory * LIMIT_PERCENT // 100


def judge(match: Match, machine: Machine) -> Verdict:
    """Of what a search found."""
    if match.problem:
        return Verdict(False, 0, match.problem)
    return verdict_of_files(match.files, machine)


def verdict_of_files(files: Iterable[File], machine: Machine) -> Verdict:
    """Of a model on the hub, by the sizes of its weights, which are exact; where models compute in float32 unpacked
    weights take up to twice as much, which only the headers of the files tell."""
    needed, room = sum(file.size for file in files if is_weights(file.name)), budget(machine)
    if needed > room:
        return Verdict(False, needed, "does not fit")
    if machine.float32 and 2 * needed > room:
        return Verdict(True, needed, "fits if its weights are quantised")
    return Verdict(True, needed, "fits")
