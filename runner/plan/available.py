"""The models and adapters of this machine: what they are, how large, and which manifests use them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.hub.jobs import Kind
from runner.hub.needs import kinds_of
from runner.hub.store import Stored, stored
from runner.inspect.files import BadFolder, DigestCache, list_files
from runner.inspect.model import ModelFacts
from runner.inspect.tensors import FLOATING
from runner.machine import Machine
from runner.plan.candidates import Candidate, examine, fit
from runner.plan.digests import adapter_digest
from runner.plan.verdict import Verdict, budget


class Use(NamedTuple):
    """A place that uses a folder (a snapshot of the hub's cache, or any other): a manifest, or what a runner serves."""

    folder: Path
    where: str


@dataclass(frozen=True, slots=True)
class Available:
    """A model, an adapter, or a quantised copy of a model, whose `source` is what it was made of. `source` is as a
    manifest would name it, `commit` empty of a folder, `refs` the branches that mean this commit here. `size` is bytes
    on the disk, `parameters` a count, 0 where unknown; `used` seconds since the epoch. `problem` is why it cannot be
    served, empty where it can."""

    source: str
    kind: Kind | Literal["copy"]
    folder: Path
    size: int
    used: float
    commit: str = ""
    refs: tuple[str, ...] = ()
    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    max_context: int = 0
    problem: str = ""
    used_by: tuple[str, ...] = ()

    @property
    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "folder": str(self.folder)}


def available(cache: Path, uses: Iterable[Use], digests: DigestCache) -> list[Available]:
    """What is in the hub's cache, commit by commit, and then the other folders that are used."""
    places: dict[Path, list[str]] = {}
    for use in uses:
        places.setdefault(use.folder, []).append(use.where)
    found = []
    for held in stored(cache):
        where = tuple(dict.fromkeys(places.pop(held.folder, ())))
        found.append(_of_cache(held, where, digests))
    beside = [(folder, where) for folder, where in places.items() if not folder.is_relative_to(cache)]
    found += [of_folder(folder, tuple(dict.fromkeys(where)), digests) for folder, where in sorted(beside)]
    return found


def _of_cache(held: Stored, where: tuple[str, ...], digests: DigestCache) -> Available:
    seen = _look(held.folder, held.repo, digests)
    return Available(
        held.repo, folder=held.folder, size=held.size, used=held.used, commit=held.commit, refs=held.refs,
        used_by=where, **seen,
    )  # fmt: skip


def of_folder(folder: Path, where: tuple[str, ...], digests: DigestCache) -> Available:
    """A folder that is not in the hub's cache."""
    try:
        files = [Path(version.path).stat() for version in list_files(folder).values()]
    except (BadFolder, OSError):
        files = []
    used = max((max(status.st_atime, status.st_mtime) for status in files), default=0.0)
    size = sum(status.st_size for status in files)
    return Available(
        str(folder), folder=folder, size=size, used=used, used_by=where, **_look(folder, str(folder), digests)
    )


def _look(folder: Path, source: str, digests: DigestCache) -> dict[str, Any]:
    try:
        kind = kinds_of(list_files(folder))[0]
        if kind == "adapter":
            adapter_digest(folder, digests)
            return {"kind": kind}
    except BadFolder as error:
        return {"kind": "model", "problem": error.message.replace(str(folder), "it")}
    candidate = examine(folder, digests, source=source)
    if candidate.facts is None:
        return {"kind": kind, "problem": candidate.problem}
    return {
        "kind": kind,
        "architecture": candidate.facts.config.model_type,
        "parameters": parameters(candidate.facts),
        "quantization": quantization(candidate.facts),
        "max_context": candidate.facts.config.max_context,
        "problem": candidate.problem,
    }


def parameters(facts: ModelFacts) -> int:
    """How many numbers a model has, counting those that are packed, and not the scales and biases of packing."""
    packed = {g.name.removesuffix(".scales") for g in facts.tensors if g.name.endswith(".scales")}
    count = 0
    for group in facts.tensors:
        layer, _, part = group.name.rpartition(".")
        if layer in packed and part in ("scales", "biases"):
            continue
        is_packed = layer in packed and group.dtype == "U32"
        bits = facts.config.packing(group.example.rpartition(".")[0]).bits if is_packed else 32
        count += group.values * 32 // bits
    return count


def quantization(facts: ModelFacts) -> str:
    """How its weights are stored, in words."""
    packing = facts.config.quantization
    if packing is not None:
        mode = "" if packing.mode == "affine" else f" {packing.mode}"
        return f"{packing.bits} bit{mode}, groups of {packing.group_size}"
    if facts.config.quantized_elsewhere:
        return facts.config.quantized_elsewhere
    floating = [group for group in facts.tensors if group.dtype in FLOATING]
    return max(floating, key=lambda group: group.nbytes).dtype.lower() if floating else ""


def verdict(candidate: Candidate, machine: Machine) -> Verdict:
    """Of a model that is here, with its contexts and rows."""
    if candidate.problem or candidate.facts is None:
        return Verdict(False, candidate.stored, candidate.problem or "it is not here")
    found = fit(candidate, budget(machine), float32=machine.float32)
    held = candidate.memory(1, 1, float32=machine.float32).held
    if found is None:
        return Verdict(False, held, "does not fit")
    return Verdict(True, held, f"{found.rows} requests of {found.context} tokens")
