"""Did you mean …?"""

from __future__ import annotations

from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean "…"?` for the nearest of the known words, or empty."""
    import difflib  # noqa: PLC0415 - only a wrong manifest pays for it, not every start

    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f'did you mean "{near[0]}"?' if near else ""
