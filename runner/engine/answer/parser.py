"""One row's text to pieces of an answer, for models that put markers around reasoning and calls.

Text comes in as it is decoded, and goes out as soon as it cannot be the beginning of a marker. Nothing is lost: a call
that cannot be read, not even mended, is content, with the markers it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from runner.engine.answer.conventions import Conventions, ToolConvention
from runner.engine.answer.harmony import HarmonyParser
from runner.engine.answer.pieces import Kind, Parser, Piece, read_calls
from runner.engine.stops import overlap

_State = Literal["start", "reasoning", "content", "call", "bare"]


def parser_for(conventions: Conventions, tools: list[dict[str, Any]] | None, prompt: str) -> Parser | None:
    """The parser of an answer to the rendered `prompt`, None where everything is content.

    `tools` None means that calls are not looked for.
    """
    if conventions.harmony:
        return HarmonyParser(tools)
    think = conventions.think
    if think is None and (tools is None or conventions.tools is None):
        return None
    return MarkedParser(conventions, tools, thinking=think is not None and prompt.rstrip().endswith(think[0]))


class MarkedParser:
    """Reasoning is looked for at the beginning of the answer only: a marker in the middle is quoted text."""

    def __init__(self, conventions: Conventions, tools: Sequence[Any] | None, *, thinking: bool) -> None:
        """`thinking`: the prompt has opened the reasoning already."""
        self._think = conventions.think
        self._tool: ToolConvention | None = None if tools is None else conventions.tools
        self._tools = tools
        self._held = ""
        self._state: _State = "reasoning" if thinking else "start"
        self._trim = thinking

    @property
    def reasoning(self) -> bool:
        """See Parser."""
        return self._state == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        """See Parser."""
        self._held += text
        return list(self._advance(last=False, cut=False))

    def finish(self, *, cut: bool) -> list[Piece]:
        """See Parser."""
        return list(self._advance(last=True, cut=cut))

    def _advance(self, *, last: bool, cut: bool) -> Iterator[Piece]:
        while self._held:
            before = self._state, len(self._held)
            match self._state:
                case "start":
                    self._begin(last)
                case "reasoning":
                    yield from self._reason(last)
                case "content":
                    yield from self._talk(last)
                case "call":
                    yield from self._call(last, cut)
                case "bare":
                    yield from self._bare(last, cut)
            if (self._state, len(self._held)) == before:
                return

    def _begin(self, last: bool) -> None:
        """Nothing has been told yet: does the answer open with reasoning, or with a bare call?"""
        text = self._held.lstrip()
        if self._think is not None:
            marker = self._think[0]
            if text.startswith(marker):
                self._held = text[len(marker) :]
                self._state, self._trim = "reasoning", True
                return
            if marker.startswith(text) and not last:
                return
        bare = self._tool is not None and self._tool.bare
        if bare and not text and not last:
            return
        self._state = "bare" if bare and text[:1] in ("{", "[") else "content"

    def _reason(self, last: bool) -> Iterator[Piece]:
        assert self._think is not None
        end = self._think[1]
        at = self._held.find(end)
        if at < 0:
            # Line ends before the closing marker are layout, so they wait for what follows them.
            sure = self._held[: len(self._held) - overlap(self._held, end)].rstrip("\n")
            yield from self._release("reasoning", 0 if last else len(self._held) - len(sure))
            return
        yield from self._say("reasoning", self._held[:at].rstrip("\n"))
        self._held = self._held[at + len(end) :]
        # After its reasoning a model may make a bare call, but will not reason again.
        self._think, self._state, self._trim = None, "start", True

    def _talk(self, last: bool) -> Iterator[Piece]:
        start = "" if self._tool is None else self._tool.start
        at = self._held.find(start) if start else -1
        if at < 0:
            yield from self._release("content", overlap(self._held, start) if start and not last else 0)
            return
        if self._held[:at].strip():
            yield from self._say("content", self._held[:at])
        self._held = self._held[at + len(start) :]
        self._state = "call"

    def _call(self, last: bool, cut: bool) -> Iterator[Piece]:
        assert self._tool is not None
        end = self._tool.end
        at = self._held.find(end) if end else -1
        if at < 0 and not last:
            return
        complete = at >= 0
        body = self._held[:at] if complete else self._held
        self._held = self._held[at + len(end) :] if complete else ""
        self._state, self._trim = "content", True
        written = f"{self._tool.start}{body}{end if complete else ''}"
        yield from self._read(self._tool, body, written, whole=complete or not cut)

    def _bare(self, last: bool, cut: bool) -> Iterator[Piece]:
        """Perhaps a call without markers: that is known when the answer has ended."""
        if not last:
            return
        assert self._tool is not None
        body, self._held = self._held, ""
        yield from self._read(self._tool, body, body, whole=not cut)

    def _read(self, tool: ToolConvention, body: str, written: str, *, whole: bool) -> Iterator[Piece]:
        calls = read_calls(tool, body, self._tools, mend=whole)
        if calls is None:
            self._trim = False
            yield from self._say("content", written)
        else:
            yield from (Piece("call", call=call) for call in calls)

    def _release(self, kind: Kind, keep: int) -> Iterator[Piece]:
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        yield from self._say(kind, text)

    def _say(self, kind: Kind, text: str) -> Iterator[Piece]:
        if self._trim:
            # Line ends after a marker are layout.
            text = text.lstrip("\n")
            self._trim = not text
        if text:
            yield Piece(kind, text)
