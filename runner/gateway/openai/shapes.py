"""How OpenAI writes a completion: what differs between `chat.completion` and `text_completion`, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from runner.gateway.openai.tools import written_call
from runner.protocol import Delta, TokenLogprob, ToolCall, Usage

encode_json = msgspec.json.Encoder().encode

# Line separators outside of ASCII are legal inside JSON, but a client that splits an event stream with str.splitlines
# would break a chunk there.
_SEPARATORS: Final = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


def encode_line(value: object) -> bytes:
    """`value` as JSON on one line, by any reading of "line"."""
    encoded = encode_json(value)
    if not encoded.isascii():
        for separator, escape in _SEPARATORS:
            if separator in encoded:
                encoded = encoded.replace(separator, escape)
    return encoded


@dataclass(slots=True)
class Choice:
    """One completion, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None

    def add(self, deltas: list[Delta]) -> None:
        """What came next."""
        for delta in deltas:
            self.texts.append(delta.text)
            if delta.reasoning:
                self.reasoning.append(delta.reasoning)
            if delta.calls:
                self.calls += delta.calls
            if delta.logprobs:
                self.logprobs += delta.logprobs
        self.finish_reason = deltas[-1].finish_reason
        self.usage = deltas[-1].usage


class Shape(Protocol):
    """One of the two ways to write a completion."""

    @property
    def id_prefix(self) -> str:
        """What ids begin with."""
        ...

    @property
    def whole_object(self) -> str:
        """`object` of an answer in one piece."""
        ...

    @property
    def chunk_object(self) -> str:
        """`object` of a chunk of a stream."""
        ...

    def choice(self, choice: Choice) -> dict[str, Any]:
        """The part of a choice that holds what was generated."""
        ...

    def first(self) -> dict[str, Any] | None:
        """The same for the chunk before any text; None for no such chunk."""
        ...

    def piece(self) -> tuple[bytes, bytes]:
        """What stands before and after the text (a JSON string) in a chunk's choice."""
        ...

    def last(self) -> dict[str, Any]:
        """The same for the chunk that has the finish reason."""
        ...

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """Logprobs of a choice; `offset` is how many characters of its text came before."""
        ...


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["content"] = text or None
            message["tool_calls"] = [written_call(call) for call in choice.calls]
        return {"message": message}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b"}"

    def last(self) -> dict[str, Any]:
        return {"delta": {}}

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        content = [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "bytes": entry.bytes,
                "top_logprobs": [
                    {"token": token, "logprob": logprob, "bytes": data} for token, logprob, data in entry.top
                ],
            }
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """`text_completion`, whole and in chunks."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {"text": "".join(choice.texts)}

    def first(self) -> dict[str, Any] | None:
        return None

    def piece(self) -> tuple[bytes, bytes]:
        return b'"text":', b""

    def last(self) -> dict[str, Any]:
        return {"text": ""}

    def logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        offsets = []
        for entry in logprobs:
            offsets.append(offset)
            offset += len(entry.token)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{token: logprob for token, logprob, _ in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer says of itself in each of its chunks. `per_prompt` choices share a prompt, which counts once;
    `echoes` are texts before those of the choices, one each, or none."""

    shape: Shape
    id: str
    created: int
    model: str
    fingerprint: str
    with_logprobs: bool = False
    with_usage: bool = False
    per_prompt: int = 1
    echoes: Sequence[str] = ()


def usage_of(usages: Sequence[Usage | None], per_prompt: int) -> dict[str, Any]:
    """OpenAI's `usage` of all choices: each prompt once, every completion, and a draft model's proposals if it made
    any."""
    prompts = [usage for usage in usages[::per_prompt] if usage is not None]
    completions = [usage for usage in usages if usage is not None]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in completions)
    accepted = sum(usage.accepted_tokens for usage in completions)
    rejected = sum(usage.rejected_tokens for usage in completions)
    answer: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
    }
    details: dict[str, int] = {}
    if accepted or rejected:
        details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    if reasoning := sum(usage.reasoning_tokens for usage in completions):
        details["reasoning_tokens"] = reasoning
    if details:
        answer["completion_tokens_details"] = details
    return answer
