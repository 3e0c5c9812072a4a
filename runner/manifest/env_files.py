"""`env_file`: variables for `${…}` from files, as Docker Compose reads them; the environment wins over them.

The syntax (quotes, comments, `export`, `${NAME:-default}` in values without single quotes) is python-dotenv's. Stricter
in two things: a line that is none of it is an error rather than passed over, and so is a variable that is not set.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from runner.errors import Diagnostic
from runner.manifest.fill import fill
from runner.manifest.inputs import MAX_BYTES, Inputs
from runner.manifest.scalars import read_scalar
from runner.manifest.tree import KeyPath, Problem, Tree

KEY: Final = "env_file"
_SINGLE_QUOTED: Final = r"\s*(export\s+)?\S+?\s*=\s*'"


def with_env_files(tree: Tree, env: Mapping[str, str], inputs: Inputs) -> Mapping[str, str]:
    """`env`, and under it what the env files of a manifest say, the later ones first.

    Files that cannot be read are left in `tree.problems`, lines that cannot in `tree.wrong`. Neither shows a value.
    """
    section = tree.data.get(KEY) if isinstance(tree.data, dict) else None
    if section is None:
        return env
    fill(tree, env, inputs, under=(KEY,))
    found: dict[str, str] = {}
    for path, name, required in _entries(tree.data[KEY]):
        text = _text(tree, path, name, inputs, required=required)
        if text is not None:
            # As the user would write it, so that annotations find the file.
            shown = str(Path(tree.place(path).source.name).parent / name)
            _read(text, shown, found, env, tree.wrong)
    return {**found, **env}


def _entries(section: Any) -> Iterator[tuple[KeyPath, str, bool]]:
    """Path in the document, file, and whether it has to be there; what has another shape is left to the models."""
    if isinstance(section, str) and section:
        yield (KEY,), section, True
    for at, entry in enumerate(section if isinstance(section, list) else ()):
        path: KeyPath = (KEY, at)
        if isinstance(entry, str) and entry:
            yield path, entry, True
        elif isinstance(entry, dict) and isinstance(entry.get("path"), str) and entry["path"]:
            required = entry.get("required")
            yield (
                (*path, "path"),
                entry["path"],
                (read_scalar(required) if isinstance(required, str) else required) is not False,
            )


def _text(tree: Tree, at: KeyPath, name: str, inputs: Inputs, *, required: bool) -> str | None:
    path = tree.folder(at) / name
    try:
        path = tree.folder(at) / Path(name).expanduser()
        content = inputs.read(path)
        if len(content) <= MAX_BYTES:
            return content.decode("utf-8-sig")
        reason = f"it is larger than {MAX_BYTES // 1024} KiB"
    except FileNotFoundError:
        if not required:
            return None
        reason = "there is none"
    except (OSError, ValueError, RuntimeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else str(getattr(error, "strerror", None) or error)
    hint = f"looked at {path}; write {{path: {name}, required: false}} for one that may be missing"
    tree.problems.append(Problem("E508", at, f'the env file "{name}" cannot be read: {reason}', hint))
    return None


def _read(text: str, file: str, found: dict[str, str], env: Mapping[str, str], wrong: list[Diagnostic]) -> None:
    """Add the variables of one file to those of the files before it."""
    # Imported here: 18 ms of the way to an open port, and most manifests have no env file.
    from dotenv.parser import parse_stream  # noqa: PLC0415
    from dotenv.variables import Variable, parse_variables  # noqa: PLC0415

    for binding in parse_stream(io.StringIO(text)):
        written = binding.original.string
        lead = written[: len(written) - len(written.lstrip())]
        line = binding.original.line + len(re.findall("\r\n|\r|\n", lead))
        if binding.error:
            # Without the line itself: it may be a secret.
            message = "is no NAME=value, which every line of an env file should be"
            wrong.append(Diagnostic(file, line, 1, "", message, "put quotes around the value", code="E509"))
        elif binding.key is not None and binding.value is not None:
            if re.match(_SINGLE_QUOTED, written):
                found[binding.key] = binding.value
                continue
            atoms = list(parse_variables(binding.value))
            known = {**found, **env}
            for atom in atoms:
                if isinstance(atom, Variable) and atom.default is None and atom.name not in known:
                    message = f"the variable {atom.name} is not set"
                    hint = f"give a default: ${{{atom.name}:-default}}; single quotes keep a ${{…}} as it is"
                    wrong.append(Diagnostic(file, line, 1, "", message, hint, code="E509"))
            found[binding.key] = "".join(atom.resolve(known) for atom in atoms)
