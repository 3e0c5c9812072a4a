"""An answer as it arrives: a stream of events, or one JSON object. Says when tokens came, how many, and what failed."""

from __future__ import annotations

import re
from array import array
from typing import Any, Final

import msgspec

from runner.bench.job import Outcome

_DONE: Final = b"[DONE]"
_DATA: Final = b"data:"
_MESSAGE_BYTES: Final = 200
"""How much of a server's error is kept."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw | None = None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self._calls)

    @property
    def _calls(self) -> bool:
        return self.tool_calls is not None and bytes(self.tool_calls) not in (b"null", b"[]")


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_NOT_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError)

_plain_text = re.compile(rb"[ !#-\[\]-~]+").fullmatch
"""Of a JSON string what needs no decoding: printable ASCII without quotes and backslashes, and not nothing."""

_PROBE: Final = "mlx-run"
_TRIES: Final = 4
"""How many of a stream's first events are looked at for what the others have in common."""


class Answer:
    """Takes the body of one answer and completes its `Outcome`; `gaps` collects the seconds between content events.

    A read may bring several events; they all count as arrived when it did. `last` is when the latest with content did,
    0 for none.

    Events of a stream differ in their text alone, most of them. So the first with text is decoded, and what stands
    before and after its text is kept: of an event that has the same around plain text it is known what it says.
    Everything else is decoded.
    """

    __slots__ = ("_after", "_before", "_buffer", "_done", "_gaps", "_outcome", "_start", "_stream", "last")

    def __init__(self, outcome: Outcome, gaps: array[float]) -> None:
        self._outcome = outcome
        self._gaps = gaps
        self._buffer = b""
        self.last = 0.0
        self._done = False
        self._stream = True
        self._before = self._after = b""
        self._start = 0

    def head(self, status: int, content_type: str) -> None:
        """The status line and the one header that matters here."""
        if status != 200:
            self._outcome.error = f"http_{status}"
        self._stream = status == 200 and "json" not in content_type
        self._outcome.streamed = self._stream

    def feed(self, data: bytes, now: float) -> None:
        """A piece of the body that arrived at `now`."""
        if self._buffer:
            data = self._buffer + data
        elif (
            (start := self._start)
            and data.startswith(self._before)
            and data.endswith(self._after)
            and _plain_text(data, start, len(data) - len(self._after))
        ):
            self._gaps.append(now - self.last)
            self.last = now
            self._outcome.chunks += 1
            return
        if not self._stream:
            self._buffer = data
            return
        *lines, self._buffer = data.split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._event(line[len(_DATA) :].strip(), now)
        if not self._start and 0 < self._outcome.chunks <= _TRIES:
            self._learn(data)

    def _learn(self, data: bytes) -> None:
        """Keeps what is around the text of an event, if `data` is one event of nothing but text.

        That it is the text which stands there is tried out: another in its place has to be found by the decoder.
        """
        line = data.removesuffix(b"\n\n").removeprefix(_DATA)
        if len(data) - len(line) != len(_DATA) + 2 or b"\n" in line:
            return
        text = _only_text(line)
        if not text:
            return
        before, quoted, after = data.partition(f'"{text}"'.encode())
        before, after = before + b'"', b'"' + after
        tried = (before + _PROBE.encode() + after).removesuffix(b"\n\n").removeprefix(_DATA)
        if quoted and _only_text(tried) == _PROBE:
            self._before, self._after, self._start = before, after, len(before)

    def _event(self, data: bytes, now: float) -> None:
        outcome = self._outcome
        if data == _DONE:
            self._done = True
            return
        try:
            event = _decode(data)
        except _NOT_JSON:
            self._fail("bad_event", data)
            return
        if event.error is not None:
            self._fail("error_event", msgspec.json.encode(event.error))
        if event.usage is not None:
            self._use(event.usage)
        for choice in event.choices:
            if choice.delta or choice.text:
                if outcome.ttft is None:
                    outcome.ttft = now - outcome.began
                else:
                    self._gaps.append(now - self.last)
                self.last = now
                outcome.chunks += 1
            if choice.finish_reason:
                outcome.finish_reason = choice.finish_reason

    def end(self, error: str = "", message: str = "") -> None:
        """The body is complete, or will never be (`error`)."""
        outcome = self._outcome
        if outcome.error.startswith("http_"):
            outcome.message = _readable(self._buffer)
        elif error:
            self._fail(error, message.encode())
        elif not self._stream:
            self._whole()
        elif not outcome.error and not (self._done or outcome.finish_reason):
            self._fail("incomplete", b"the stream ended without a finish reason")

    def _whole(self) -> None:
        try:
            event = _decode(self._buffer)
        except _NOT_JSON:
            self._fail("bad_body", self._buffer)
            return
        if event.usage is not None:
            self._use(event.usage)
        for choice in event.choices:
            self._outcome.finish_reason = choice.finish_reason or "stop"
        if not event.choices:
            self._fail("bad_body", self._buffer)

    def _use(self, usage: _Usage) -> None:
        outcome = self._outcome
        outcome.prompt_tokens = usage.prompt_tokens
        outcome.completion_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            outcome.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _fail(self, kind: str, message: bytes) -> None:
        if not self._outcome.error:
            self._outcome.error, self._outcome.message = kind, _readable(message)


def _only_text(data: bytes) -> str:
    """The text of an event that has some, and nothing else that is looked at here; "" for any other."""
    try:
        event = _decode(data)
    except _NOT_JSON:
        return ""
    if event.error is not None or event.usage is not None or len(event.choices) != 1:
        return ""
    (choice,) = event.choices
    if choice.finish_reason:
        return ""
    return (choice.delta.content if choice.delta else choice.text) or ""


def _readable(body: bytes) -> str:
    """The message in a server's error body, whichever shape it has."""
    try:
        value = msgspec.json.decode(body)
    except _NOT_JSON:
        return body[:_MESSAGE_BYTES].decode(errors="replace").strip()
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return str(value)[:_MESSAGE_BYTES]
