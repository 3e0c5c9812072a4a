"""gpt-oss's way to write: every message names its channel, and a call is a message to a function.

`analysis` is reasoning, `final` is the answer, `commentary` is either a call (`to=functions.NAME`) or said to the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from runner.engine.answer.conventions import ToolConvention
from runner.engine.answer.pieces import Kind, Piece, read_calls
from runner.engine.stops import overlap

_MESSAGE: Final = "<|message|>"
_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT: Final = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser:
    """Takes one row's text apart."""

    def __init__(self, tools: list[dict[str, Any]] | None) -> None:
        """`tools` None: calls are content."""
        self._tools = tools
        self._held = ""
        self._kind: Kind | None = None
        self._function = ""

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is reasoning."""
        return self._kind == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        return list(self._advance(last=False))

    def finish(self, *, cut: bool) -> list[Piece]:
        """What is left when nothing more will come."""
        return list(self._advance(last=True, cut=cut))

    def _advance(self, *, last: bool, cut: bool = False) -> Iterator[Piece]:
        while self._held:
            if self._kind is None:
                if not self._open(last):
                    return
                continue
            found = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
            if not found:
                if self._kind == "call" and not last:
                    return
                keep = 0 if last else max(overlap(self._held, end) for end in _ENDS)
                cut_at = len(self._held) - keep
                body, self._held = self._held[:cut_at], self._held[cut_at:]
                yield from self._say(body, cut=cut)
                return
            at, end = min(found)
            body, self._held = self._held[:at], self._held[at + len(end) :]
            yield from self._say(body, cut=False)
            self._kind = None

    def _open(self, last: bool) -> bool:
        """Reads a message's header; whether there was one."""
        at = self._held.find(_MESSAGE)
        if at < 0:
            if not self._held.startswith("<") and not _HEADER_WORDS.match(self._held):
                # No header at all: a model that has left its format is still heard.
                self._kind = "content"
                return True
            if last:
                self._held = ""
            return False
        header, self._held = self._held[:at], self._held[at + len(_MESSAGE) :]
        channel = _CHANNEL.search(header)
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self._tools is not None:
            self._kind, self._function = "call", recipient.group(1)
        else:
            self._kind = "reasoning" if channel is not None and channel.group(1) == "analysis" else "content"
        return True

    def _say(self, body: str, *, cut: bool) -> Iterator[Piece]:
        if self._kind != "call":
            if body:
                assert self._kind is not None
                yield Piece(self._kind, body)
            return
        name = self._function
        one = ToolConvention("harmony", "", "", lambda text, _: {"name": name, "arguments": text.strip() or "{}"})
        calls = read_calls(one, body, self._tools, mend=not cut)
        if calls is None:
            yield Piece("content", body)
        else:
            yield from (Piece("call", call=call) for call in calls)


_HEADER_WORDS: Final = re.compile(r"\s*(assistant|analysis|commentary|final|to=|$)")
