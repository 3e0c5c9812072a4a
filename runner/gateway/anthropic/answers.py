"""Deltas → Anthropic's message: one JSON object, or its sequence of events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from runner.gateway.dialects import anthropic_error
from runner.gateway.errors import describe, report
from runner.gateway.exchange import Exchange, new_id
from runner.gateway.generation import Generation
from runner.gateway.openai.shapes import encode_json, encode_line
from runner.protocol import Delta, ToolCall, Usage

Kind = Literal["thinking", "text"]

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTA: Final[dict[Kind, tuple[bytes, bytes]]] = {
    "text": (b'"delta":{"type":"text_delta","text":', b"}}\n\n"),
    "thinking": (b'"delta":{"type":"thinking_delta","thinking":', b"}}\n\n"),
}


@dataclass(slots=True)
class Head:
    """What an answer says of itself."""

    model: str
    id: str = field(default_factory=lambda: new_id("msg_"))


async def whole(generation: Generation, head: Head) -> bytes:
    """The answer in one piece. Raises what the generation raises."""
    content: list[dict[str, Any]] = []
    texts: list[str] = []
    kind: Kind = "text"

    def close() -> None:
        if texts:
            text = "".join(texts)
            more = {"signature": signature(text)} if kind == "thinking" else {"citations": None}
            content.append({"type": kind, kind: text, **more})
            texts.clear()

    deltas = [*generation.first[1]]
    async for _, more in generation.rest:
        deltas += more
    for delta in deltas:
        for part, text in _parts(delta):
            if part != kind:
                close()
                kind = part
            texts.append(text)
        for call in delta.calls or ():
            close()
            content.append(_tool_use(call, json.loads(call.arguments)))
    close()
    last = deltas[-1]
    reason, stop = _ending(last)
    message = _message(head, content, reason, stop, last.usage or Usage(0, 0))
    return encode_json(message)


async def events(generation: Generation, head: Head, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; an error after the first is an `error` event, and ends them."""
    writer = Events(head)
    try:
        yield b"".join(writer.encode(generation.first[1]))
        async for _, deltas in generation.rest:
            if data := b"".join(writer.encode(deltas)):
                yield data
    except Exception as error:  # noqa: BLE001 - the status has been sent: only the stream is left to say it
        report(error, {"request_id": exchange.request_id, "route": exchange.route})
        exchange.status = describe(error)[0]
        yield error_event(error)


class Events:
    """Writes one answer's events, in the order that Anthropic's clients rely on."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._index = -1
        self._open: Kind | None = None
        self._begun = False
        self._thought: list[str] = []
        self._before = b""

    def encode(self, deltas: list[Delta]) -> Iterator[bytes]:
        """The events of some deltas."""
        if not self._begun:
            self._begun = True
            usage = deltas[0].usage or Usage(0, 0)
            message = _message(self._head, [], None, None, Usage(usage.prompt_tokens, 1, usage.cached_tokens))
            yield _event("message_start", {"message": message})
            yield _event("ping", {})
        for delta in deltas:
            for kind, text in _parts(delta):
                yield from self._text(kind, text)
            for call in delta.calls or ():
                yield from self._call(call)
            if delta.finish_reason is not None:
                yield from self._end(delta)

    def _text(self, kind: Kind, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close()
            self._index += 1
            self._open = kind
            block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {"citations": None})}
            yield _event("content_block_start", {"index": self._index, "content_block": block})
            start = f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            self._before = start.encode() + _DELTA[kind][0]
        if kind == "thinking":
            self._thought.append(text)
        yield self._before + encode_line(text) + _DELTA[kind][1]

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close()
        self._index += 1
        yield _event("content_block_start", {"index": self._index, "content_block": _tool_use(call, {})})
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        yield _event("content_block_delta", {"index": self._index, "delta": delta})
        yield _event("content_block_stop", {"index": self._index})

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": signature("".join(self._thought))}
            yield _event("content_block_delta", {"index": self._index, "delta": delta})
            self._thought.clear()
        yield _event("content_block_stop", {"index": self._index})
        self._open = None

    def _end(self, delta: Delta) -> Iterator[bytes]:
        yield from self._close()
        reason, stop = _ending(delta)
        usage = _usage(delta.usage or Usage(0, 0))
        yield _event("message_delta", {"delta": {"stop_reason": reason, "stop_sequence": stop}, "usage": usage})
        yield _event("message_stop", {})


def error_event(error: Exception) -> bytes:
    """An error as an event, for an answer that has begun."""
    status, _, body = describe(error)
    return b"event: error\ndata: " + anthropic_error(body, status) + b"\n\n"


def signature(thinking: str) -> str:
    """Clients send it back with the block; it says nothing but that the text is the one we sent."""
    return hashlib.sha256(thinking.encode()).hexdigest()


def _parts(delta: Delta) -> Iterator[tuple[Kind, str]]:
    if delta.reasoning:
        yield "thinking", delta.reasoning
    if delta.text:
        yield "text", delta.text


def _ending(delta: Delta) -> tuple[str, str | None]:
    if delta.stop:
        return "stop_sequence", delta.stop
    return _REASONS.get(delta.finish_reason or "stop", "end_turn"), None


def _tool_use(call: ToolCall, arguments: dict[str, Any]) -> dict[str, Any]:
    call_id = call.id or new_id("toolu_")
    return {"type": "tool_use", "id": call_id, "name": call.name, "input": arguments, "caller": {"type": "direct"}}


def _message(
    head: Head, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: Usage
) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "stop_details": None,
        "container": None,
        "usage": _usage(usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens from the prefix cache are counted apart from the others, as Anthropic does."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": None,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
        "service_tier": None,
        "inference_geo": None,
    }


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode_line({"type": name, **fields}))
