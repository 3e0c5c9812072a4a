"""Fills in the `${…}` of a tree, once it is merged: what a later file replaced need not be known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from runner.manifest.inputs import Inputs
from runner.manifest.interpolate import InterpolationError, interpolate
from runner.manifest.tree import KeyPath, Problem, Tree, Variable, is_secret

_MAX_SECRET_BYTES: Final = 64 * 1024


def fill(tree: Tree, env: Mapping[str, str], inputs: Inputs, *, under: KeyPath = ()) -> None:
    """Fill in the references below a path, from `env` and from secret files, which are noted in `inputs`.

    What cannot be filled in stays as it is, with a problem in `tree.problems`: under a key that is the user's own it
    does not matter.
    """
    for path in [path for path in tree.references if path[: len(under)] == under]:
        text = tree.references.pop(path)
        try:
            filled = interpolate(text, env, lambda name, path=path: _secret(tree, path, name, inputs))  # type: ignore[misc]
        except InterpolationError as error:
            tree.problems.append(Problem(error.code, path, error.message, error.hint))
            continue
        tree.set(path, filled)
        tree.variables[path] = Variable(text, filled)


def _secret(tree: Tree, at: KeyPath, name: str, inputs: Inputs) -> str:
    """The content of a secret file that is named at a place, without the last line break."""
    if not (len(at) == 5 and is_secret(at) and at[3] == "api_keys"):
        message = "${file:…} is for secrets, and works in auth.api_keys only"
        raise InterpolationError("E504", message, "give the value")
    path = tree.folder(at) / name
    try:
        path = tree.folder(at) / Path(name).expanduser()
        content = inputs.read(path)
        text = content.decode().rstrip("\r\n")
    except (OSError, ValueError, RuntimeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        message = f'the secret file "{name}" cannot be read: {reason}'
        raise InterpolationError("E503", message, f"looked at {path}") from None
    if len(content) > _MAX_SECRET_BYTES:
        message = f'the secret file "{name}" is larger than {_MAX_SECRET_BYTES // 1024} KiB'
        raise InterpolationError("E503", message)
    return text
