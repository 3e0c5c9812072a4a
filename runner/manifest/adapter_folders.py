"""`adapters: {from: ./adapters/*}`: each folder that a pattern matches and that holds an adapter is one, by its name.

Dropping a folder in is the edit, so what is dropped in never makes the manifest wrong: what cannot be used is left out
with a warning. An adapter that is listed by name comes before one that is found, and the first pattern before others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any, Final

from runner.manifest.inputs import Inputs
from runner.manifest.names import NAME_PATTERN, PATTERNS_KEY, PLAIN_MODEL
from runner.manifest.presence import is_file, is_folder
from runner.manifest.tree import KeyPath, Problem, Tree

CONFIG: Final = "adapter_config.json"
"""What makes a folder an adapter. Whether it is whole is seen when it is read."""


def find_adapters(tree: Tree, inputs: Inputs) -> None:
    """Put an entry for each folder in place of every `from`; the patterns are noted in `inputs`.

    What is wrong with the patterns themselves goes to `tree.wrong`, what is left out to `tree.warnings`.
    """
    models = tree.data.get("models") if isinstance(tree.data, dict) else None
    for name, model in models.items() if isinstance(models, dict) else ():
        adapters = model.get("adapters") if isinstance(model, dict) else None
        if isinstance(adapters, dict) and PATTERNS_KEY in adapters:
            path: KeyPath = ("models", name, "adapters")
            patterns = adapters.pop(PATTERNS_KEY)
            for at, pattern in _patterns(tree, (*path, PATTERNS_KEY), patterns):
                _add(tree, path, adapters, at, pattern, inputs)


def _patterns(tree: Tree, path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, str]]:
    """Each pattern with its place."""
    if value is None:
        return
    if isinstance(value, list) and not value:
        _wrong(tree, Problem("E205", path, "is empty", "give it a pattern, such as ./adapters/*, or remove it"))
    unfilled = {problem.path: problem for problem in tree.problems}
    for at, pattern in [((*path, i), p) for i, p in enumerate(value)] if isinstance(value, list) else [(path, value)]:
        if not isinstance(pattern, str) or not pattern:
            message = "should be a path with a pattern, or a list of them"
            _wrong(tree, Problem("E203", at, message, "such as ./adapters/*"))
        elif at in unfilled:
            _wrong(tree, unfilled[at])
        elif "**" in pattern:
            message = "** would look through whole trees of folders, which is not possible here"
            _wrong(tree, Problem("E210", at, message, "write a * for each level: ./adapters/*/*"))
        else:
            yield at, pattern


def _add(tree: Tree, path: KeyPath, adapters: dict[str, Any], at: KeyPath, pattern: str, inputs: Inputs) -> None:
    """Add what one pattern matches to the adapters of one model."""
    try:
        whole = str(Path(escape(str(tree.folder(at)))) / Path(pattern).expanduser())
        folders = inputs.match(whole)
    except (OSError, ValueError, RuntimeError, re.error) as error:
        _wrong(tree, Problem("E210", at, f"cannot be used as a pattern: {error}"))
        return
    for folder in folders:
        name = folder.name
        if reason := _unusable(tree, path, adapters, folder):
            _warn(tree, at, *reason)
            continue
        adapters[name] = {"source": str(folder)}
        for here in ((*path, name), (*path, name, "source")):
            tree.keys[here] = tree.values[here] = tree.values[at]
        tree.found.add((*path, name))
    if not folders:
        hint = "an adapter is a folder with adapter_config.json and its weights"
        _warn(tree, at, "W611", f'no folder matches "{pattern}" yet', hint)


def _unusable(tree: Tree, path: KeyPath, adapters: dict[str, Any], folder: Path) -> tuple[str, str, str] | None:
    """Code, message and hint for a folder that is left out."""
    name, said = folder.name, _visible(folder.name)
    if not is_file(folder / CONFIG):
        nested = any(is_file(child / CONFIG) for child in _folders_in(folder))
        hint = f"its folders are: write {said}/*" if nested else "it is looked at again when that changes"
        return "W612", f"the folder {said} is no adapter (yet): it holds no {CONFIG}", hint
    if not re.fullmatch(NAME_PATTERN, name) or name in (*PLAIN_MODEL, PATTERNS_KEY):
        near = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:63]
        hint = 'use a-z, 0-9, ".", "_" and "-"' + (f", such as {near}" if near and near != name else "")
        return "W613", f"the folder {said} is left out, for no adapter can have this name", hint
    if name not in adapters:
        return None
    entry = adapters[name]
    source = entry.get("source") if isinstance(entry, dict) else entry
    if isinstance(source, str) and _same(tree.folder((*path, name, "source")) / Path(source), folder):
        return "", "", ""
    which = "found by a pattern above" if (*path, name) in tree.found else "listed"
    return "W613", f"the folder {folder} is left out, for an adapter {name} is {which}", "rename one of the two"


def _visible(name: str) -> str:
    """As it can be printed: whoever may make a folder should not steer the terminal of whoever reads of it."""
    return name if name.isprintable() else ascii(name)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [child for child in folder.iterdir() if is_folder(child)]
    except OSError:
        return []


def _same(one: Path, other: Path) -> bool:
    try:
        return one.expanduser().samefile(other)
    except (OSError, RuntimeError):
        return False


def _wrong(tree: Tree, problem: Problem) -> None:
    tree.wrong.append(tree.diagnostic(problem))  # the key is taken out, so nothing else would tell


def _warn(tree: Tree, at: KeyPath, code: str, message: str, hint: str) -> None:
    if code:
        tree.warnings.append(tree.diagnostic(Problem(code, at, message, hint))._replace(severity="warning"))
