"""Deltas → an answer: one JSON object, or a stream of chunks.

A chunk differs from the one before only in its text. So what stays the same is encoded once a request, and a token
costs the encoding of its text and the joining of three pieces.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

from runner.gateway.errors import as_event, describe, report
from runner.gateway.exchange import Exchange
from runner.gateway.generation import Batch, Generation
from runner.gateway.openai.shapes import Choice, Head, encode_json, encode_line, usage_of
from runner.gateway.openai.tools import written_call
from runner.protocol import Delta, TokenLogprob, Usage

DONE: Final = b"data: [DONE]\n\n"
_END: Final = b"}]}\n\n"
_MORE: Final = b',"logprobs":null,"finish_reason":null' + _END
"""The end of a choice, and of its chunk, that is neither the last nor has logprobs."""


async def whole(generation: Generation, head: Head) -> bytes:
    """The answer in one piece. Raises what the generation raises."""
    shape = head.shape
    choices = [Choice([*head.echoes[index : index + 1]]) for index in range(generation.count)]
    index, deltas = generation.first
    choices[index].add(deltas)
    async for index, deltas in generation.rest:
        choices[index].add(deltas)
    written = [
        {
            "index": index,
            **shape.choice(choice),
            "logprobs": shape.logprobs(choice.logprobs, 0) if head.with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return encode_json(
        {
            "id": head.id,
            "object": shape.whole_object,
            "created": head.created,
            "model": head.model,
            "choices": written,
            "usage": usage_of([choice.usage for choice in choices], head.per_prompt),
            "system_fingerprint": head.fingerprint,
        }
    )


async def events(generation: Generation, head: Head, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, one write for each batch of deltas, then `[DONE]`.

    What goes wrong after the first chunk is an error event, and no `[DONE]` follows it.
    """
    encode = Chunks(head, generation.count).encode
    try:
        data = encode(generation.first)
        if data:
            yield data
        async for batch in generation.rest:
            data = encode(batch)
            if data:
                yield data
    except Exception as error:  # noqa: BLE001 - the status has been sent: only the stream is left to say it
        report(error, {"request_id": exchange.request_id, "route": exchange.route})
        exchange.status = describe(error)[0]
        yield as_event(error)


class Chunks:
    """Encodes the chunks of one answer of `count` choices."""

    def __init__(self, head: Head, count: int) -> None:
        shape = head.shape
        start = {
            "id": head.id,
            "object": shape.chunk_object,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._head = head
        self._bare = b"data: " + encode_line(start)[:-1]
        prefix = self._bare + (b',"usage":null' if head.with_usage else b"")
        self._starts = [b'%b,"choices":[{"index":%d,' % (prefix, index) for index in range(count)]
        before, self._after = shape.piece()
        self._openings = [start + before for start in self._starts]
        self._closing = self._after + _MORE
        first = shape.first()
        self._first = None if first is None else encode_json(first)[1:-1] + _MORE
        self._begun = [False] * count
        self._offsets = [0] * count
        self._calls = [0] * count
        self._usages: list[Usage | None] = [None] * count
        self._running = count

    def encode(self, batch: Batch) -> bytes:
        """The events of one batch; empty when there is nothing to tell (a character is not complete yet)."""
        index, deltas = batch
        delta = deltas[-1]
        if len(deltas) == 1 and self._begun[index] and delta.finish_reason is None and delta.logprobs is None:
            text = delta.text
            if delta.reasoning or delta.calls:
                return self._encode_any(index, deltas)
            return self._openings[index] + encode_line(text) + self._closing if text else b""
        return self._encode_any(index, deltas)

    def _encode_any(self, index: int, deltas: list[Delta]) -> bytes:
        pieces: list[bytes] = []
        if not self._begun[index]:
            self._begun[index] = True
            if self._first is not None:
                pieces += (self._starts[index], self._first)
            for echo in self._head.echoes[index : index + 1]:
                pieces += (self._openings[index], encode_line(echo), self._closing)
        for delta in deltas:
            if delta.reasoning:
                pieces += self._delta(index, {"reasoning_content": delta.reasoning})
        text = "".join([delta.text for delta in deltas])
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        if text or logprobs:
            pieces += (self._openings[index], encode_line(text), self._after, b',"logprobs":')
            pieces += (self._logprobs(index, logprobs), b',"finish_reason":null', _END)
        for delta in deltas:
            for call in delta.calls or ():
                written = {"index": self._calls[index], **written_call(call)}
                self._calls[index] += 1
                pieces += self._delta(index, {"tool_calls": [written]})
        reason = deltas[-1].finish_reason
        if reason is not None:
            pieces += (self._starts[index], encode_json(self._head.shape.last())[1:-1])
            pieces += (b',"logprobs":null,"finish_reason":', encode_json(reason), _END)
            pieces += self._ended(index, deltas[-1].usage)
        return b"".join(pieces)

    def _delta(self, index: int, delta: dict[str, Any]) -> tuple[bytes, ...]:
        """A chunk of a chat with something other than content."""
        return (self._starts[index], b'"delta":', encode_line(delta), _MORE)

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> bytes:
        if not self._head.with_logprobs or not logprobs:
            return b"null"
        offset = self._offsets[index]
        self._offsets[index] += sum(len(entry.token) for entry in logprobs)
        return encode_line(self._head.shape.logprobs(logprobs, offset))

    def _ended(self, index: int, usage: Usage | None) -> tuple[bytes, ...]:
        """What follows a choice's last chunk: after the last choice the usage, when it was asked for, and the end."""
        self._usages[index] = usage
        self._running -= 1
        if self._running:
            return ()
        if not self._head.with_usage:
            return (DONE,)
        total = encode_json(usage_of(self._usages, self._head.per_prompt))
        return (self._bare, b',"choices":[],"usage":', total, b"}\n\n", DONE)
