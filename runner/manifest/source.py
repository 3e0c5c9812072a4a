"""One manifest file: its text, and how places in it are shown without its secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runner.errors import Diagnostic, ManifestError

MAX_BYTES: Final = 1024 * 1024
_EXCERPT_WIDTH: Final = 160
_LINE_BREAK: Final = "\r\n|[\n\r\x85\u2028\u2029]"  # as libyaml counts lines


@dataclass(slots=True)
class Source:
    """`name` is the path as the user gave it. `secrets` are (line, first column, end column), from 0, to be hidden."""

    name: str
    path: Path
    content: bytes = field(repr=False)
    text: str = field(repr=False)
    secrets: list[tuple[int, int, int]] = field(default_factory=list, repr=False)
    _lines: list[str] | None = field(default=None, repr=False)

    def excerpt(self, line: int) -> str:
        """The source line, counted from 1, with secrets as asterisks; empty where there is none."""
        if self._lines is None:
            self._lines = re.split(_LINE_BREAK, self.text)
        if not 1 <= line <= len(self._lines):
            return ""
        text = self._lines[line - 1]
        for at, start, end in self.secrets:
            if at == line - 1:
                text = text[:start] + "*" * (min(end, len(text)) - start) + text[end:]
        return text[:_EXCERPT_WIDTH]

    def diagnostic(self, code: str, line: int, column: int, path: str, message: str, hint: str = "") -> Diagnostic:
        """A diagnostic at a place of this file; `line` and `column` count from 1, 0 for the file as a whole."""
        return Diagnostic(self.name, line, column, path, message, hint, self.excerpt(line), code)


def read_source(path: Path) -> Source:
    """Read one manifest file.

    Raises ManifestError where it is missing, unreadable, too large or not UTF-8.
    """
    name = str(path)

    def fail(code: str, message: str, hint: str = "", line: int = 0, column: int = 0) -> ManifestError:
        return ManifestError([Diagnostic(name, line, column, "", message, hint, code=code)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise fail("E101", "there is no such file", "give the path of a manifest, such as configs/dev.yaml") from None
    except IsADirectoryError:
        raise fail("E101", "is a folder, not a manifest", "give the path of a YAML file in it") from None
    except OSError as error:
        raise fail("E101", f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise fail("E102", f"is larger than {MAX_BYTES // 1024} KiB, which no manifest is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        raise fail("E103", "is not UTF-8 text", "save it as UTF-8", line, column) from None
    return Source(name, path.absolute(), content, text)
