"""One manifest file: its text, and how places in it are shown without its secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runner.errors import Diagnostic, ManifestError
from runner.manifest.foreign import encoding_of, look_closely
from runner.manifest.inputs import MAX_BYTES, Inputs

_EXCERPT_WIDTH: Final = 160
_VISIBLE: Final = {code: 0x2400 + code for code in range(32) if code != 9} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
"""Control characters as pictures of them: an excerpt is printed, and must not steer a terminal."""
_LINE_BREAK: Final = "\r\n|[\n\r\x85\u2028\u2029]"  # as libyaml counts lines


@dataclass(slots=True)
class Source:
    """`name` is the path as the user gave it. `secrets` are (line, first column, end column), from 0, to be hidden."""

    name: str
    path: Path
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
        return text[:_EXCERPT_WIDTH].translate(_VISIBLE)

    def hide_all(self) -> None:
        """Show no line of this file."""
        self.secrets += [(line, 0, 1 << 30) for line in range(self.text.count("\n") + 1)]

    def character(self, line: int, column: int) -> str:
        """The character at a place that counts from 0; empty at the end of a line."""
        self.excerpt(0)
        assert self._lines is not None, "an excerpt splits the text"
        return self._lines[line][column : column + 1] if line < len(self._lines) else ""

    def diagnostic(self, code: str, line: int, column: int, path: str, message: str, hint: str = "") -> Diagnostic:
        """A diagnostic at a place of this file; `line` and `column` count from 1, 0 for the file as a whole."""
        excerpt = self.excerpt(line)
        if not excerpt.isascii():
            hint = look_closely(excerpt, column, hint)
        return Diagnostic(self.name, line, column, path, message, hint, excerpt, code)


def read_source(path: Path, inputs: Inputs) -> Source:
    """Read one manifest file, and note it in `inputs`.

    Raises ManifestError where it is missing, unreadable, too large or not UTF-8.
    """
    name = str(path)

    def fail(code: str, message: str, hint: str = "", line: int = 0, column: int = 0) -> ManifestError:
        return ManifestError([Diagnostic(name, line, column, "", message, hint, code=code)])

    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise fail("E101", "has a path that is not UTF-8 text", "rename the folder that it is in") from None
    try:
        content = inputs.read(path.absolute())
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
        raise fail("E103", *encoding_of(content), line, column) from None
    if "\0" in text and encoding_of(content)[0].startswith("is UTF-16"):
        raise fail("E103", *encoding_of(content), 1, 1)
    return Source(name, path.absolute(), text)
