"""`${VARIABLE}` in scalars, by the rules of Docker Compose, and `${file:path}` for secrets.

=====================  ==============================================================
`${VAR}`               the value; an error where VAR is not set
`${VAR:-default}`      the default where VAR is not set, or empty
`${VAR-default}`       the default where VAR is not set
`${VAR:?message}`      an error with this message where VAR is not set, or empty
`${VAR?message}`       an error with this message where VAR is not set
`${VAR:+text}`         the text where VAR is set and not empty, else nothing
`${VAR+text}`          the text where VAR is set, else nothing
`${file:path}`         the contents of a file, without the last line break
`$$`                   a dollar sign
=====================  ==============================================================

Defaults, messages and texts are interpolated themselves, when they are used. Stricter than Compose in two things: a
variable that is not set is an error rather than empty text with a warning, because an empty key or path is never what
was meant; and `$VAR` without braces is one, because a key or a stop text may well have a dollar sign in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

_REFERENCE: Final = (  # text, compiled by `re` at first use: most manifests have none
    r"\$(?:(?P<escaped>\$)"
    r"|\{(?:(?P<file>file:)(?![-?+])|(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<operator>:?[-?+])?))"
)
_MAX_NESTING: Final = 8


class InterpolationError(Exception):
    """A `${…}` that cannot be filled in. `hint` says what to do, `code` is one of `runner.manifest.codes`."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def interpolate(text: str, env: Mapping[str, str], read_file: Callable[[str], str], *, nesting: int = 0) -> str:
    """`text` with every reference filled in.

    Raises InterpolationError; errors of `read_file` pass through.
    """
    if nesting > _MAX_NESTING:
        raise InterpolationError("E502", f"${{…}} is nested more than {_MAX_NESTING} deep")
    parts: list[str] = []
    position = 0
    while (dollar := text.find("$", position)) >= 0:
        parts.append(text[position:dollar])
        match = re.compile(_REFERENCE).match(text, dollar)
        if match is None:
            message = "a $ that begins no variable"
            raise InterpolationError("E502", message, "write ${NAME} for a variable, $$ for a dollar sign")
        position = match.end()
        if match["escaped"]:
            parts.append("$")
        else:
            end = _closing_brace(text, position)
            word = text[position:end]
            position = end + 1

            def fill(word: str) -> str:
                return interpolate(word, env, read_file, nesting=nesting + 1)

            if match["file"]:
                parts.append(read_file(fill(word)))
            elif match["operator"]:
                parts.append(_variable(match["name"], match["operator"], word, env, fill))
            elif word:
                message = "a ${…} that is none of the known forms"
                raise InterpolationError("E502", message, "write ${NAME}, ${NAME:-default} or ${NAME:?message}")
            else:
                parts.append(_variable(match["name"], None, "", env))
    parts.append(text[position:])
    return "".join(parts)


def _closing_brace(text: str, position: int) -> int:
    """Where the `}` is that closes the reference whose word begins at `position`."""
    depth = 1
    for match in re.compile(r"\$\$|\$\{|\}").finditer(text, position):
        if match[0] == "${":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    raise InterpolationError("E502", "a ${ has no closing }", "write $$ for a dollar sign")


def _variable(
    name: str, operator: str | None, word: str, env: Mapping[str, str], fill: Callable[[str], str] = str
) -> str:
    value = env.get(name)
    if operator is None:
        if value is None:
            hint = f"set it, or give a default: ${{{name}:-default}}"
            raise InterpolationError("E501", f"the environment variable {name} is not set", hint)
        return value
    there = value is not None and (value != "" or not operator.startswith(":"))
    if operator.endswith("+"):
        return fill(word) if there else ""
    if value is not None and there:
        return value
    if operator.endswith("-"):
        return fill(word)
    state = "is empty" if value is not None else "is not set"
    reason = f": {fill(word)}" if word else ""
    raise InterpolationError("E501", f"the environment variable {name} {state}{reason}")
