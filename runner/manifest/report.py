"""Diagnostics as text for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from runner.errors import Diagnostic


def render_diagnostics(diagnostics: Iterable[Diagnostic]) -> str:
    """`file:line:column: path: message`, the source line with a caret, and the hint, for each; no final line break.

    ::

        dev.yaml:7:5: models.chat.sorce: unknown key "sorce"
            7 |     sorce: ../model
              |     ^ did you mean "source"?
    """
    return "\n".join(_render(diagnostic) for diagnostic in diagnostics)


def _render(found: Diagnostic) -> str:
    place = f"{found.file}:{found.line}:{found.column}" if found.line else found.file
    head = ": ".join(part for part in (place, found.path, found.message) if part)
    if not found.excerpt.strip():
        return f"{head}\n  hint: {found.hint}" if found.hint else head
    gutter = f"{found.line:>5} | "
    pointer = f"{'':>5} | {_blank(found.excerpt[: found.column - 1])}^ {found.hint}".rstrip()
    return f"{head}\n{gutter}{found.excerpt.rstrip()}\n{pointer}"


def _blank(text: str) -> str:
    """Spaces as wide as the text; tabs stay tabs, so that the caret stands below its place."""
    return "".join("\t" if c == "\t" else "  " if unicodedata.east_asian_width(c) in "WF" else " " for c in text)
