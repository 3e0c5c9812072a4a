"""From files to a validated manifest: read, merge, interpolate, shape, cross-references."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from runner.errors import Diagnostic, ManifestError
from runner.manifest.adapter_folders import find_adapters
from runner.manifest.checks import check
from runner.manifest.drift import NO_CHANGES, OVERLAY_NAME, Changes, overlay_text
from runner.manifest.env_files import with_env_files
from runner.manifest.fill import fill
from runner.manifest.inputs import Inputs
from runner.manifest.lock import Lock, LockedSource, lock_path, read_lock
from runner.manifest.models import Manifest, Model
from runner.manifest.overlay import merge
from runner.manifest.pending import not_yet
from runner.manifest.servers import Server
from runner.manifest.shape import validate
from runner.manifest.source import Source, read_source
from runner.manifest.tree import KeyPath, Problem, Tree, dotted
from runner.manifest.walk import read_tree

_TOKEN: Final = "HF_TOKEN"  # noqa: S105 - its name
"""The variable with which private repositories are read, as the hub's own tools have it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid manifest, and where its parts are in its files.

    `paths` are those of the manifest and its overlays, absolute; `inputs` are all files whose content matters. `digest`
    is of their contents and of the variables that were filled in; it covers secrets, so keep it in memory. `warnings`
    are what merging and reading found; `runner.manifest.advice` has more. `hub_token` is HF_TOKEN, as the environment
    or an env file has it. `lock` is what the lock file beside says; `frozen`: the lock has to be there and to hold.
    """

    manifest: Manifest
    paths: tuple[Path, ...]
    inputs: Inputs
    digest: str
    tree: Tree = field(repr=False, compare=False)
    hub_token: str = field(default="", repr=False)
    lock: Lock | None = field(default=None, repr=False)
    frozen: bool = False

    @property
    def path(self) -> Path:
        """The first file, which the others go over."""
        return self.paths[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read, or looked for: the manifest's, then those that they name."""
        return tuple(path for path in self.inputs.files if path != lock_path(self.paths))

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        """What keeps nothing from running: found while the files were put together, or told by `warn` since."""
        return tuple(self.tree.in_order(self.tree.warnings))

    @property
    def found(self) -> frozenset[KeyPath]:
        """The adapters that a pattern of folders found, as `("models", "chat", "adapters", "pirate")`. They may be
        half-copied, which is no error."""
        return frozenset(self.tree.found)

    def pin(self, path: KeyPath, source: str, revision: str | None) -> LockedSource | None:
        """What the lock says of the source at a path, None where it says nothing of this one."""
        return self.lock.pin(dotted(path), source, revision) if self.lock is not None else None

    def warn(self, path: KeyPath, message: str, hint: str = "", *, code: str) -> None:
        """Add to the warnings."""
        self.tree.warnings.append(self.at(path, message, hint, code=code)._replace(severity="warning"))

    def at(self, path: KeyPath, message: str, hint: str = "", *, at_key: bool = False, code: str = "") -> Diagnostic:
        """A diagnostic at a path of the document, such as `("models", "chat", "source")`, or the nearest above it."""
        return self.tree.diagnostic(Problem(code, path, message, hint, at_key))

    def folder(self, path: KeyPath) -> Path:
        """Where a relative path starts that is written at `path`: the folder of the file that says it."""
        return self.tree.folder(path)


def load_manifest(
    paths: Path | Sequence[Path],
    env: Mapping[str, str],
    inputs: Inputs | None = None,
    *,
    frozen: bool = False,
    changes: Changes = NO_CHANGES,
) -> Loaded:
    """Read and check a manifest, or several files merged left to right; `env` fills in `${…}`.

    `changes` go over all of them, but for the models that rest: those are declared as before.
    Raises ManifestError with everything that is wrong, in the order of the files; `inputs`, if given, then has what was
    read so far. Nothing outside the manifest, the files it names and its patterns of adapters is looked at: whether
    models exist is for `runner.plan.resolve`.
    """
    inputs = Inputs() if inputs is None else inputs
    tree, env = _read(paths, env, inputs, changes)
    paths = tuple(source.path for source in tree.sources if source.name != OVERLAY_NAME)
    lock = read_lock(paths, inputs)
    find_adapters(tree, inputs)
    manifest, problems = validate(tree)
    unfilled = [p for p in tree.problems if _is_in(tree.data, p.path)]
    places = {p.path for p in unfilled}
    problems = [p for p in problems if p.path not in places] + unfilled
    refused = list(not_yet(tree.data))
    for later in refused:  # what is wrong inside of it does not matter
        problems = [p for p in problems if p.path[: len(later.path)] != later.path]
    problems += refused
    problems += _check(tree, manifest, problems)
    if any(p.code == "E508" for p in problems):  # what an env file would have set is no error of its own
        problems = [p for p in problems if p.code != "E501"]
    if manifest is None or problems or tree.wrong:
        raise ManifestError(tree.in_order([*tree.wrong, *map(tree.diagnostic, problems)]))
    return Loaded(manifest, paths, inputs, _digest(tree, inputs), tree, env.get(_TOKEN, ""), lock, frozen)


def manifest_name(paths: Path | Sequence[Path], env: Mapping[str, str]) -> str:
    """The name of the runner that a manifest is for, whatever else is wrong with it.

    Raises ManifestError where the files cannot be read, or name none.
    """
    tree, _ = _read(paths, env, Inputs())
    name = tree.data.get("name") if isinstance(tree.data, dict) else None
    if isinstance(name, str) and ("name",) not in {p.path for p in tree.problems}:
        return name
    raise ManifestError([tree.diagnostic(Problem("E202", ("name",), "gives the runner no name", "write name: dev"))])


def _read(
    paths: Path | Sequence[Path], env: Mapping[str, str], inputs: Inputs, changes: Changes = NO_CHANGES
) -> tuple[Tree, Mapping[str, str]]:
    """The merged document, with variables filled in, and all of these."""
    trees, wrong = [], []
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            trees.append(read_tree(read_source(path, inputs)))
        except ManifestError as error:
            wrong += error.diagnostics
    if wrong:
        raise ManifestError(wrong)
    if changes:
        trees.append(read_tree(Source(OVERLAY_NAME, trees[0].sources[0].path, overlay_text(changes))))
    tree = merge(trees)
    env = with_env_files(tree, env, inputs)
    fill(tree, env, inputs)
    return tree, env


def _check(tree: Tree, manifest: Manifest | None, problems: list[Problem]) -> list[Problem]:
    """Cross-references of the manifest, or of its sound part: one round of errors rather than two."""
    models = _section(tree.data, "models")
    if manifest is not None:
        return check(manifest.servers, manifest.models, models)
    wrong = {p.path[:2] for p in problems}

    def sound(section: str) -> dict[str, Any]:
        entries = _section(tree.data, section) or {}
        return {} if (section,) in wrong else {n: e for n, e in entries.items() if (section, n) not in wrong}

    return check(
        {name: Server.model_validate(entry) for name, entry in sound("servers").items()},
        {name: Model.model_validate(entry) for name, entry in sound("models").items()},
        models,
    )


def _section(data: Any, name: str) -> dict[str, Any] | None:
    section = data.get(name) if isinstance(data, dict) else None
    return section if isinstance(section, dict) else None


def _is_in(data: Any, path: KeyPath) -> bool:
    """Whether a path is still there once the user's own keys are taken out."""
    for part in path:
        if isinstance(data, dict) and part not in data:
            return False
        data = data[part]
    return True


def _digest(tree: Tree, inputs: Inputs) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, state in inputs.files.items():
        digest.update(repr((str(path), state)).encode())
    digest.update(repr(sorted(tree.found)).encode())
    for variable in tree.variables.values():
        digest.update(repr(tuple(variable)).encode())
    return digest.hexdigest()
