"""Small damage in the JSON of a tool call, mended: what models get wrong, and nothing that would be guessing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_TRAILING_COMMA: Final = re.compile(r",(\s*[}\]])")
_FENCE: Final = re.compile(r"^\s*```(?:json)?\s*(.*?)\s*(?:```)?\s*$", re.DOTALL)


def repaired(text: str) -> Iterator[str]:
    """Other readings of a call's text, the most likely first; none where there is nothing to mend.

    A fence is taken off, a comma before a closing bracket goes, and brackets and strings that were left open (an answer
    that hit its limit of tokens, a bracket forgotten) are closed.
    """
    seen = {text}
    for candidate in _candidates(text):
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def _candidates(text: str) -> Iterator[str]:
    fence = _FENCE.match(text)
    plain = fence.group(1) if fence else text
    yield plain
    yield _TRAILING_COMMA.sub(r"\1", plain)
    if plain.lstrip()[:1] in ("{", "["):
        yield closed(plain)
        yield _TRAILING_COMMA.sub(r"\1", closed(plain))
        yield closed(plain.rstrip()[:-1]) if plain.rstrip()[-1:] in ("}", "]") else plain


def closed(text: str) -> str:
    """JSON text with every string, object and array that was left open closed."""
    open_brackets: list[str] = []
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "{[":
            open_brackets.append("}" if character == "{" else "]")
        elif character in "}]" and open_brackets:
            open_brackets.pop()
    if escaped:
        text = text[:-1]
    return text + ('"' if in_string else "") + "".join(reversed(open_brackets))
