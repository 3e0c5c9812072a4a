"""What a file is, or what got into it, where it is no manifest: told in place of what a parser stumbles over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

ENV_FILE: Final = "these are NAME=value lines, as in an env file"
"""What is said of a file that may well be full of secrets."""

# Compiled by `re` at first use: only what cannot be read is looked at.
_ANYWHERE: Final = (
    (r"^(<{7} |={7}$|>{7} )", "a merge conflict is not resolved", "keep one side, and remove the lines that mark them"),
    (r"^```", "a fence of Markdown stands here", "remove the lines with ```"),
    (r"(?i)\A\s*<(!doctype|html|\?xml|!--)", "this is a web page, not the file itself", "download its raw form"),
    (r"\A\s*\[[\w.\"-]+\]\s*\n(?=\w+ *= )", "this is TOML", "a manifest is YAML: name: value"),
    (r"\A(\s|#.*\n|export )*[A-Z][A-Z0-9_]*=", ENV_FILE, "a manifest names such a file: env_file: FILE"),
    (r"^\+ .*\n(.*\n)*?\+ ", "lines begin with +, as in a diff", "remove the + signs"),
    (r"^\s*//", 'a comment begins with "//"', 'in YAML it begins with "#"'),
)
_IN_THE_LINE: Final = ((r"\{\{|\{%", "a template is not filled in", "render it first; a manifest has ${VARIABLE}"),)
_OTHER_TOOLS: Final = (
    ({"apiVersion", "kind"}, "this is a Kubernetes object"),
    ({"services"}, "this is a file of Docker Compose"),
)

_INVISIBLE: Final = {
    "\u00a0": "a no-break space", "\u2007": "a figure space", "\u202f": "a narrow no-break space",
    "\u3000": "a wide space", "\u200b": "a zero-width space", "\u200c": "a zero-width non-joiner",
    "\u200d": "a zero-width joiner", "\u200e": "a direction mark", "\u200f": "a direction mark",
    "\u2060": "a word joiner", "\ufeff": "a byte order mark", "\u00ad": "a soft hyphen",
}  # fmt: skip
_LOOKALIKES: Final = {
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "−": "-",
    "：": ":", "，": ",", "｛": "{", "｝": "}", "［": "[", "］": "]",
}  # fmt: skip


class Foreign(NamedTuple):
    """What was found; `line` and `column` count from 1."""

    line: int
    column: int
    message: str
    hint: str


def foreign(text: str, line: int) -> Foreign | None:
    """What a text that cannot be read as a manifest is, or has in it. `line` is where that was noticed, from 1."""
    for pattern, message, hint in _ANYWHERE:
        if match := re.search(pattern, text, re.MULTILINE):
            lead = len(match[0]) - len(match[0].lstrip()) if pattern.startswith("^") else 0
            before = text[: match.start() + lead]
            return Foreign(before.count("\n") + 1, len(before) - before.rfind("\n"), message, hint)
    lines = text.splitlines()
    wrong = lines[line - 1] if 0 < line <= len(lines) else ""
    for pattern, message, hint in _IN_THE_LINE:
        if match := re.search(pattern, wrong):
            return Foreign(line, match.start() + 1, message, hint)
    return None


def other_tool(keys: Iterable[str]) -> str:
    """Whose file has these keys at the top; empty where that cannot be told."""
    given = set(keys)
    return next((message for its, message in _OTHER_TOOLS if its <= given and not given & {"name", "servers"}), "")


def look_closely(excerpt: str, column: int, hint: str) -> str:
    """The hint for a line in which something is wrong: first what cannot be seen, or looks like something else."""
    for at, char in enumerate(excerpt, 1):
        if char in _INVISIBLE:
            plain = "a plain space" if char in "\u00a0\u2007\u202f\u3000" else "nothing"
            return f"column {at} has {_INVISIBLE[char]} (U+{ord(char):04X}): write {plain}"
    for at, char in enumerate(excerpt, 1):
        if char in _LOOKALIKES and (at == column or (at > column and not hint)):
            return f"column {at} has {char} (U+{ord(char):04X}): write {_LOOKALIKES[char]}"
    return hint


def encoding_of(content: bytes) -> tuple[str, str]:
    """Message and hint for what is not UTF-8."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or _every_other_is_null(content):
        return "is UTF-16, not UTF-8", "save it as UTF-8"
    if b"\0" in content[:4096]:
        return "is no text", "give the path of a YAML file"
    return "is not UTF-8 text", "save it as UTF-8"


def _every_other_is_null(content: bytes) -> bool:
    head = content[:256]
    return len(head) >= 4 and any(head[at::2].count(0) > 0.8 * len(head[at::2]) for at in (0, 1))
