"""What was found in a manifest, and as text for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from runner.errors import Diagnostic


class FileReport(NamedTuple):
    """What was found in one file, which is named as the user named it, or in it and the `overlays` that go over it.

    `notes` say what could not be looked at; `memory` is what the models take, where that was asked for.
    """

    file: str
    diagnostics: tuple[Diagnostic, ...] = ()
    overlays: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    memory: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """All files, for people."""
        return " + ".join((self.file, *self.overlays))

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """Those that keep the file from use."""
        return tuple(d for d in self.diagnostics if d.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether the file can be used; warnings do not count."""
        return not self.errors


def render_diagnostics(diagnostics: Iterable[Diagnostic]) -> str:
    """`file:line:column: path: message [code]`, the source line with a caret, and the hint, for each.

    There is no final line break.

    ::

        dev.yaml:7:5: models.chat.sorce: unknown key "sorce" [E201]
            7 |     sorce: ../model
              |     ^ did you mean "source"?
    """
    return "\n".join(_render(diagnostic) for diagnostic in diagnostics)


def _render(found: Diagnostic) -> str:
    place = f"{found.file}:{found.line}:{found.column}" if found.line else found.file
    severity = "warning" if found.severity == "warning" else ""
    head = ": ".join(part for part in (place, severity, found.path, found.message) if part)
    head += f" [{found.code}]" if found.code else ""
    if not found.excerpt.strip():
        return f"{head}\n  hint: {found.hint}" if found.hint else head
    gutter = f"{found.line:>5} | "
    pointer = f"{'':>5} | {_blank(found.excerpt[: found.column - 1])}^ {found.hint}".rstrip()
    return f"{head}\n{gutter}{found.excerpt.rstrip()}\n{pointer}"


def _blank(text: str) -> str:
    """Spaces as wide as the text; tabs stay tabs, so that the caret stands below its place."""
    return "".join("\t" if c == "\t" else "  " if unicodedata.east_asian_width(c) in "WF" else " " for c in text)
