"""What an engine says to the runner."""

from __future__ import annotations

from typing import Literal

import msgspec


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame after a connection is accepted."""

    version: int
    pid: int
    model: str
    digest: str
    loaded: bool
    adapters: list[str] = []


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """What the engine does before it is ready: `importing`, `weights`, `adapters`, `warmup`."""

    stage: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The model is in memory and has generated a token. Readiness is this frame.

    `weights_bytes` and `active_bytes` are bytes, `seconds` is since the process began, `max_context` is tokens.
    `device` is MLX's name of where it runs, `notes` are facts the user should know (fallbacks taken, libraries
    preloaded).
    """

    weights_bytes: int
    active_bytes: int
    seconds: float
    max_context: int
    device: str
    architecture: str = ""
    notes: list[str] = []


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The model cannot be loaded; the engine exits after this frame."""

    reason: str
    hint: str = ""


class AdapterLoaded(msgspec.Struct, frozen=True, tag="adapter_loaded"):
    """The adapter is resident. `layers` counts the layers it applies to; `bytes` is what it takes."""

    key: str
    layers: int
    bytes: int
    rank: int


class AdapterRefused(msgspec.Struct, frozen=True, tag="adapter_refused"):
    """The adapter cannot be used; nothing changed."""

    key: str
    reason: str


class AdapterDropped(msgspec.Struct, frozen=True, tag="adapter_dropped"):
    """No new rows for this key."""

    key: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token with its natural-log probability, and `top` alternatives as (token text, logprob, bytes)."""

    token: str
    logprob: float
    bytes: list[int]
    top: list[tuple[str, float, list[int]]] = []


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of one request. `cached_tokens` of the prompt came from the prefix cache.

    Of the draft model's proposals, `accepted_tokens` are part of the completion, and `rejected_tokens` were verified in
    vain. `reasoning_tokens` of the completion were reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    reasoning_tokens: int = 0


FinishReason = Literal["stop", "length", "tool_calls", "error", "cancelled"]


class ToolCall(msgspec.Struct, frozen=True, array_like=True):
    """A call of a tool, whole. `arguments` is the text of a JSON object; `id` is the model's own, "" without one."""

    name: str
    arguments: str
    id: str = ""


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one row has new. The last delta of a request has `finish_reason`, and is its only end.

    The first and the last have `usage`. `stop` is the stop string that ended the answer, "" for another end.

    `text` may be empty (a character is split over tokens, or a stop string may be forming). `tokens` counts the new
    tokens. With finish_reason "error", `error` says why. `reasoning` came before `text`, and `calls` after it.
    """

    id: int
    text: str
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str = ""
    reasoning: str = ""
    calls: list[ToolCall] | None = None
    stop: str = ""


class Step(msgspec.Struct, frozen=True, tag="step"):
    """All deltas of one step of the engine loop."""

    deltas: list[Delta]


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The request was refused before it became a row. `status` is the HTTP status to answer with (400, 404, 503)."""

    id: int
    status: int
    reason: str
    param: str | None = None
    code: str | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """The engine's counters, sent when they changed, at most every half second, and once more when it goes idle.

    `budget_bytes` is the memory limit that it keeps to now, 0 for none, and `reserved_bytes` what it needs for its
    weights and for the requests it works on up to their ends. `*_total` only grow. `rows` are decoding, `prefilling`
    are in prefill, `waiting` are queued. Of `drafted_tokens_total`, which the draft model proposed, the model accepted
    `accepted_tokens_total`.
    """

    rows: int
    prefilling: int
    waiting: int
    adapters: list[str]
    active_bytes: int
    peak_bytes: int
    cache_bytes: int
    prefix_cache_bytes: int
    prompt_tokens_total: int
    cached_tokens_total: int
    completion_tokens_total: int
    steps_total: int
    cancelled_total: int
    failed_total: int
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
    budget_bytes: int = 0
    reserved_bytes: int = 0


class Overrun(msgspec.Struct, frozen=True, tag="overrun"):
    """The process uses more memory than it may, in bytes, and ends so that another can begin anew."""

    used: int
    limit: int


FromEngine = (
    Hello
    | Loading
    | Loaded
    | LoadFailed
    | AdapterLoaded
    | AdapterRefused
    | AdapterDropped
    | Step
    | Rejected
    | Stats
    | Overrun
)
