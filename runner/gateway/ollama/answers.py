"""Deltas → Ollama's answers: one JSON object, or one a line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from runner.gateway.dialects import ollama_error
from runner.gateway.errors import describe, report
from runner.gateway.exchange import Exchange
from runner.gateway.generation import Generation
from runner.gateway.openai.shapes import encode_json, encode_line
from runner.protocol import Delta, TokenLogprob, ToolCall, Usage

Form = Literal["chat", "generate"]


@dataclass(slots=True)
class Head:
    """What an answer says of itself. `think`: whether the client reads reasoning apart; else it is left out."""

    model: str
    form: Form
    think: bool = True
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def line(self, content: dict[str, Any], *, done: bool = False) -> dict[str, Any]:
        """An object of the stream, with what all of them have."""
        return {"model": self.model, "created_at": now(), **content, "done": done}


async def whole(generation: Generation, head: Head) -> bytes:
    """The answer in one piece. Raises what the generation raises."""
    head.first = time.perf_counter()
    deltas = [*generation.first[1]]
    async for _, more in generation.rest:
        deltas += more
    text = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    calls = [call for delta in deltas for call in delta.calls or ()]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return encode_json(
        {**head.line(_content(head, text, reasoning, calls, logprobs), done=True), **_end(head, deltas[-1])}
    )


async def lines(generation: Generation, head: Head, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """The answer as lines; an error after the first is a line with `error`, and the last."""
    head.first = time.perf_counter()
    try:
        yield _encode(generation.first[1], head)
        async for _, deltas in generation.rest:
            if data := _encode(deltas, head):
                yield data
    except Exception as error:  # noqa: BLE001 - the status has been sent: only the stream is left to say it
        report(error, {"request_id": exchange.request_id, "route": exchange.route})
        exchange.status = describe(error)[0]
        yield error_line(error)


def error_line(error: Exception) -> bytes:
    """An error as a line, for an answer that has begun."""
    status, _, body = describe(error)
    return ollama_error(body, status) + b"\n"


def loaded(head: Head, reason: str) -> bytes:
    """The answer to a request without a prompt, which only makes sure of a model."""
    return encode_json({**head.line(_content(head, "", "", [], []), done=True), "done_reason": reason})


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _encode(deltas: list[Delta], head: Head) -> bytes:
    written: list[bytes] = []
    text = "".join([delta.text for delta in deltas])
    reasoning = "".join([delta.reasoning for delta in deltas])
    calls = [call for delta in deltas for call in delta.calls or ()]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    if text or calls or logprobs or (reasoning and head.think):
        written += (encode_line(head.line(_content(head, text, reasoning, calls, logprobs))), b"\n")
    if deltas[-1].finish_reason is not None:
        last = {**head.line(_content(head, "", "", [], []), done=True), **_end(head, deltas[-1])}
        written += (encode_line(last), b"\n")
    return b"".join(written)


def _content(
    head: Head, text: str, reasoning: str, calls: list[ToolCall], logprobs: list[TokenLogprob]
) -> dict[str, Any]:
    content: dict[str, Any] = {"thinking": reasoning} if reasoning and head.think else {}
    if head.form == "generate":
        content = {"response": text, **content}
    else:
        message: dict[str, Any] = {"role": "assistant", "content": text, **content}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        content = {"message": message}
    if logprobs:
        content["logprobs"] = [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "bytes": entry.bytes,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": b} for t, p, b in entry.top],
            }
            for entry in logprobs
        ]
    return content


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "function": function} if call.id else {"function": function}


def _end(head: Head, delta: Delta) -> dict[str, Any]:
    """What the last object adds. Durations are in nanoseconds; the prompt's ends with the first token."""
    usage = delta.usage or Usage(0, 0)
    ended = time.perf_counter()
    return {
        "done_reason": "length" if delta.finish_reason == "length" else "stop",
        "total_duration": int((ended - head.started) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int((head.first - head.started) * 1e9),
        "eval_count": usage.completion_tokens,
        "eval_duration": int((ended - head.first) * 1e9),
    }
