"""From a file to a validated manifest: read, interpolate, shape, cross-references."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import Diagnostic, ManifestError
from runner.manifest.checks import check
from runner.manifest.models import Manifest, Model, Server
from runner.manifest.pending import not_yet
from runner.manifest.shape import validate
from runner.manifest.source import read_source
from runner.manifest.tree import KeyPath, Problem, Tree, read_tree


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid manifest, and where its parts are in the file.

    `path` is absolute. `files` are all files whose content matters: the manifest, then the secrets it names. `digest`
    is of their contents and of the variables that were filled in; it covers secrets, so keep it in memory.
    """

    manifest: Manifest
    path: Path
    files: tuple[Path, ...]
    digest: str
    tree: Tree = field(repr=False, compare=False)

    def at(self, path: KeyPath, message: str, hint: str = "", *, at_key: bool = False, code: str = "") -> Diagnostic:
        """A diagnostic at a path of the document, such as `("models", "chat", "source")`, or the nearest above it."""
        return self.tree.diagnostic(Problem(code, path, message, hint, at_key))


def load_manifest(path: Path, env: Mapping[str, str]) -> Loaded:
    """Read and check one manifest; `env` fills in `${…}`.

    Raises ManifestError with everything that is wrong, in the order of the file. Nothing outside the manifest and the
    secret files it names is looked at: whether models exist is for `runner.plan.resolve`.
    """
    source = read_source(path)
    tree = read_tree(source, env)
    manifest, problems = validate(tree)
    unfilled = [p for p in tree.problems if _is_in(tree.data, p.path)]
    places = {p.path for p in unfilled}
    problems = [p for p in problems if p.path not in places] + unfilled
    refused = list(not_yet(tree.data))
    for later in refused:  # what is wrong inside of it does not matter
        problems = [p for p in problems if p.path[: len(later.path)] != later.path]
    problems += refused
    problems += _check(tree, manifest, problems)
    if manifest is None or problems:
        found = sorted(map(tree.diagnostic, problems), key=lambda d: (d.line, d.column))
        raise ManifestError(list(dict.fromkeys(found)))
    return Loaded(manifest, source.path, (source.path, *tree.files), _digest(tree), tree)


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


def _digest(tree: Tree) -> str:
    digest = hashlib.blake2b(tree.source.content, digest_size=16)
    for path, content in tree.files.items():
        digest.update(repr((str(path), content)).encode())
    for variable in tree.variables.values():
        digest.update(repr(tuple(variable)).encode())
    return digest.hexdigest()
