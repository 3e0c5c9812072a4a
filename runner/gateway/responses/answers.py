"""Deltas → a response: an object whose items grow, and the events that tell of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from runner.gateway.exchange import new_id
from runner.gateway.openai.shapes import encode_line
from runner.gateway.responses.wire import ResponsesRequest
from runner.protocol import Delta, Generate, TokenLogprob, ToolCall, Usage

Object = dict[str, Any]


def new_response(request: ResponsesRequest, generate: Generate, model: str) -> Object:
    """A response that has just begun."""
    sampling = generate.sampling
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "error": None,
        "model": model,
        "previous_response_id": request.previous_response_id,
        "instructions": request.instructions,
        "output": [],
        "tools": [_tool(tool) for tool in msgspec.to_builtins(request.tools or [])],
        "tool_choice": msgspec.to_builtins(request.tool_choice) or "auto",
        "parallel_tool_calls": generate.parallel_tool_calls,
        "text": {"format": {"type": "text"}, **_given(request.text)},
        "reasoning": {"effort": None, "summary": None, **_given(request.reasoning)},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": sampling.logprobs or 0,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "truncation": "disabled",
        "store": request.store is not False,
        "background": False,
        "service_tier": "default",
        "metadata": request.metadata or {},
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
        "user": request.user,
        "usage": None,
    }


class Building:
    """A response on its way. `add` takes deltas and yields the events that they make; the object is current after."""

    def __init__(self, response: Object) -> None:
        self.response = response
        self._sequence = 0
        self._open: Object | None = None
        self._texts: list[str] = []
        self._logprobs: list[Object] = []

    def begin(self) -> Iterator[bytes]:
        """The first events."""
        yield self._event("response.created", {"response": self.response})
        yield self._event("response.in_progress", {"response": self.response})

    def add(self, deltas: list[Delta]) -> Iterator[bytes]:
        """What came next."""
        for delta in deltas:
            if delta.reasoning:
                yield from self._text("reasoning", delta.reasoning, [])
            if delta.text or (delta.logprobs and self._is_open("message")):
                yield from self._text("message", delta.text, [_logprob(entry) for entry in delta.logprobs or ()])
            for call in delta.calls or ():
                yield from self._call(call)
            if delta.finish_reason is not None:
                yield from self._end(delta)

    def fail(self, error: Object) -> Iterator[bytes]:
        """The events of an answer that cannot be finished."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": error["message"]}}
        yield self._event("error", {"error": error, "code": error["code"], "message": error["message"], "param": None})
        yield self._event("response.failed", {"response": self.response})

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _text(self, kind: str, text: str, logprobs: list[Object]) -> Iterator[bytes]:
        if not self._is_open(kind):
            yield from self._close("completed")
            yield from self._start(kind)
        self._texts.append(text)
        self._logprobs += logprobs
        where = self._where()
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", {**where, "delta": text})
        else:
            yield self._event("response.output_text.delta", {**where, "delta": text, "logprobs": logprobs})

    def _start(self, kind: str) -> Iterator[bytes]:
        if kind == "reasoning":
            item: Object = {"id": new_id("rs_"), "type": kind, "status": "in_progress", "summary": [], "content": []}
        else:
            item = {"id": new_id("msg_"), "type": kind, "status": "in_progress", "role": "assistant", "content": []}
        self.response["output"].append(item)
        self._open = item
        self._texts, self._logprobs = [], []
        yield self._event("response.output_item.added", {"output_index": self._index, "item": item})
        yield self._event("response.content_part.added", {**self._where(), "part": self._part("", [])})

    def _close(self, status: str) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        text, where = "".join(self._texts), self._where()
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", {**where, "text": text})
        else:
            yield self._event("response.output_text.done", {**where, "text": text, "logprobs": self._logprobs})
        part = self._part(text, self._logprobs)
        yield self._event("response.content_part.done", {**where, "part": part})
        item |= {"status": status, "content": [part]}
        yield self._event("response.output_item.done", {"output_index": self._index, "item": item})
        self._open = None

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close("completed")
        item: Object = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id or new_id("call_"),
            "name": call.name,
            "arguments": "",
        }
        self.response["output"].append(item)
        yield self._event("response.output_item.added", {"output_index": self._index, "item": item})
        where = {"item_id": item["id"], "output_index": self._index}
        yield self._event("response.function_call_arguments.delta", {**where, "delta": call.arguments})
        done = {**where, "name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", done)
        item |= {"status": "completed", "arguments": call.arguments}
        yield self._event("response.output_item.done", {"output_index": self._index, "item": item})

    def _end(self, delta: Delta) -> Iterator[bytes]:
        cut = delta.finish_reason == "length"
        if cut and not self.response["output"]:
            yield from self._start("message")
        yield from self._close("incomplete" if cut else "completed")
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "usage": usage_of(delta.usage or Usage(0, 0)),
        }
        name = "response.incomplete" if cut else "response.completed"
        yield self._event(name, {"response": self.response})

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _where(self) -> Object:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._index, "content_index": 0}

    def _part(self, text: str, logprobs: list[Object]) -> Object:
        if self._is_open("reasoning"):
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _event(self, name: str, fields: Object) -> bytes:
        data = encode_line({"type": name, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def usage_of(usage: Usage) -> Object:
    """Token counts under this API's names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _given(fields: Any) -> Object:
    if fields is None:
        return {}
    plain: Object = msgspec.to_builtins(fields)
    return {name: value for name, value in plain.items() if value is not None}


def _tool(tool: Object) -> Object:
    shown = {name: tool.get(name) for name in ("type", "name", "description", "parameters")}
    return {**shown, "strict": bool(tool.get("strict"))}


def _logprob(entry: TokenLogprob) -> Object:
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": entry.bytes,
        "top_logprobs": [{"token": t, "logprob": p, "bytes": b} for t, p, b in entry.top],
    }
