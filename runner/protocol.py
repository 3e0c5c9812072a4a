"""The messages between the runner and an engine process, and their framing.

An engine listens on a unix socket in the state folder; the runner connects. Both directions carry frames: a 4-byte
big-endian length, then one msgpack-encoded tagged struct. Closing the socket is how either side learns that the other
is gone. One `Step` frame carries what all rows of one decode step produced, so the cost of a step in the runner does
not grow with a Python call chain per token.

Adapters are known to the engine by `key` (content digest and scale), never by name: the runner maps names to keys, so
an adapter that changes under its name is simply another key, rows keep the key they began with, and the prefix cache
is keyed by it.
"""

from __future__ import annotations

from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

T = TypeVar("T")

VERSION: Final = 2
MAX_FRAME: Final = 64 * 1024 * 1024
"""Bytes. A longer frame is a protocol error, and ends the connection."""


class AdapterSource(msgspec.Struct, frozen=True):
    """A LoRA adapter to hold resident. `key` is its identity; `scale` replaces the adapter's own when given."""

    key: str
    path: str
    scale: float | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process needs to serve one model. Written as JSON beside its socket, mode 0600.

    `digest` identifies what cannot change without a new process; `prefix_cache_bytes`, `memory_limit_bytes` are bytes;
    `budget_bytes` is what memory it may come to for now, 0 for as much as the limit, and `working_bytes` of it are
    left for what is computed; `row_bytes` is the most that a row keeps however long it gets, 0 if not known;
    `max_context` is tokens (prompt + completion), 0 for the model's own; `prefill_step_size` is tokens per prefill
    chunk; `draft` is the folder of a draft model, "" for none, which proposes `num_draft_tokens` at a time at most;
    `dtype` is what the model computes in, "" for its own (float32 on the CPU); `kv_bits` quantise the KV cache, in
    groups of `kv_group_size` values, 0 not; `chat_template` is a file in place of the model's own, "" for that;
    `tool_parser` names the convention of tool calls, "" for what the chat template tells; `orphan_grace` is how long,
    in seconds, the engine waits without a runner before it exits; `control_group` is the folder of a group that the
    engine enters before it allocates, "" for none.
    """

    model: str
    path: str
    digest: str
    adapters: tuple[AdapterSource, ...] = ()
    max_rows: int = 32
    max_queue: int = 1024
    prefill_step_size: int = 512
    max_context: int = 0
    prefix_cache_bytes: int = 0
    memory_limit_bytes: int = 0
    budget_bytes: int = 0
    working_bytes: int = 0
    row_bytes: int = 0
    draft: str = ""
    num_draft_tokens: int = 0
    dtype: str = ""
    kv_bits: int = 0
    kv_group_size: int = 64
    chat_template: str = ""
    tool_parser: str = ""
    orphan_grace: float = 5.0
    control_group: str = ""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next token. Names and meanings are mlx-lm's and OpenAI's.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and penalties at their neutral value are off.
    `repetition_penalty`, `presence_penalty` and `frequency_penalty` look at the last `repetition_context_size` tokens
    for the first, at the generated tokens for the other two (as OpenAI documents them).
    `logprobs` is the number of alternatives per token (0: only the chosen one's), None for no logprobs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None


class Grammar(msgspec.Struct, frozen=True):
    """What the text of an answer has to match.

    `source` is a JSON Schema (`json`), a regular expression for the whole text (`regex`), a grammar in llguidance's
    Lark dialect (`lark`), or a JSON list of the strings to choose from (`choice`). `param` is the request's field that
    it stands in, for refusals to name.
    """

    kind: Literal["json", "regex", "lark", "choice"]
    source: str
    param: str


# ------------------------------------------------------------------ runner → engine


class Generate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Generate one completion. Exactly one of `messages` (rendered by the chat template) and `prompt` is given.

    `prompt` is text or token ids. `adapter` is a key, "" for the base model. `stop` strings are not part of the text
    that comes back. `max_tokens` 0 means as many as the context has room for. With a `grammar`, the answer ends where
    the grammar does.

    `tools` (in OpenAI's shape) are shown to the model by its template, and its calls come back as calls; None means
    that text which looks like a call is text. Without `parallel_tool_calls` the first call ends the answer. Of the
    tools named in `must_call` one has to be called.

    With `continue_final` the last message, the assistant's, is the beginning of the answer. With `count_only` nothing
    is generated: one delta comes back, whose usage has the prompt's tokens.
    """

    id: int
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    adapter: str = ""
    max_tokens: int = 0
    stop: list[str] = []
    sampling: Sampling = Sampling()
    grammar: Grammar | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    must_call: list[str] = []
    parallel_tool_calls: bool = True
    continue_final: bool = False
    count_only: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Drop the row. No more is sent for `id`, and it is not an error if it has ended already."""

    id: int


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Make an adapter resident; answered with AdapterLoaded or AdapterRefused."""

    adapter: AdapterSource


class DropAdapter(msgspec.Struct, frozen=True, tag="drop_adapter"):
    """Take no new rows for `key`, and free it when the last row that uses it has ended; answered with AdapterDropped
    at once. Unknown keys are answered alike."""

    key: str


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """Change limits in place. None leaves a limit as it is."""

    max_rows: int | None = None
    max_queue: int | None = None
    prefill_step_size: int | None = None
    max_context: int | None = None
    prefix_cache_bytes: int | None = None
    num_draft_tokens: int | None = None
    memory_limit_bytes: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish the running rows for at most `deadline` seconds, fail what is left, then exit 0."""

    deadline: float = 0.0


# ------------------------------------------------------------------ engine → runner


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


ToEngine = Generate | Cancel | LoadAdapter | DropAdapter | Configure | Shutdown
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

_encoder = msgspec.msgpack.Encoder()
_LENGTH: Final = 4


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a frame, ready to write."""
    buffer = bytearray(_LENGTH)
    _encoder.encode_into(message, buffer, _LENGTH)
    buffer[:_LENGTH] = (len(buffer) - _LENGTH).to_bytes(_LENGTH, "big")
    return bytes(buffer)


class FrameDecoder(Generic[T]):
    """Splits a byte stream into messages; feed it whatever arrived.

    Raises ValueError on a frame over MAX_FRAME and msgspec.DecodeError on one that does not decode: the connection is
    then of no more use.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Every message that is complete now, in order."""
        self._buffer += data
        messages: list[T] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH:
            size = int.from_bytes(self._buffer[start : start + _LENGTH], "big")
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes is over the limit of {MAX_FRAME}")
            end = start + _LENGTH + size
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + _LENGTH : end]))
            start = end
        del self._buffer[:start]
        return messages


def decoder_to_engine() -> FrameDecoder[ToEngine]:
    """A decoder for the engine's side."""
    return FrameDecoder(msgspec.msgpack.Decoder(ToEngine))


def decoder_from_engine() -> FrameDecoder[FromEngine]:
    """A decoder for the runner's side."""
    return FrameDecoder(msgspec.msgpack.Decoder(FromEngine))
