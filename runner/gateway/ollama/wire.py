"""Ollama's request bodies as types: decoded and validated in one pass, unknown fields refused.

`options` for the hardware and for the size of the context are accepted and without effect: the manifest decides those.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from runner.gateway.openai.wire import Name, Probability, Stop

MAX_TOOLS: Final = 256
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens, and when to stop. `num_predict` below 0 is as many as the context has room for."""

    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    num_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    f16_kv: Any = None
    logits_all: Any = None
    low_vram: Any = None
    main_gpu: Any = None
    num_batch: Any = None
    num_ctx: Annotated[int, Meta(ge=0)] | None = None
    num_gpu: Any = None
    num_keep: Any = None
    num_thread: Any = None
    numa: Any = None
    use_mlock: Any = None
    use_mmap: Any = None
    vocab_only: Any = None
    embedding_only: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    penalize_newline: Any = None
    tfs_z: Any = None
    typical_p: Any = None


UNSUPPORTED_OPTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "mirostat": (0,),
    "penalize_newline": (True,),
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
}
"""Refused, but for the values that change nothing."""


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was called."""

    name: Name
    arguments: dict[str, Any] = {}
    index: Any = None
    description: Any = None


class PastCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that the assistant made in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Any = None


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | None = None


class Function(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """One tool."""

    function: Function
    type: str = "function"


Think = bool | Literal["low", "medium", "high", "max"]

KeepAlive = float | Annotated[str, Meta(pattern=r"^[-+]?(0|([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+)$")]
"""Seconds, or a duration such as "5m" or "1h30m"; negative is for ever."""


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Streamed unless `stream` is false. `keep_alive` is accepted and without effect: the manifest says which models
    stay."""

    model: Name
    stream: bool | None = None
    options: Options | None = None
    think: Think | None = None
    format: Any = None
    keep_alive: KeepAlive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    adapter_name: Name | None = None
    shift: Any = None
    truncate: Any = None


class ChatRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/chat`. Without messages the model is only made sure of."""

    messages: list[Message] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None


class GenerateRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/generate`. `raw` prompts go to the model as they are; others through its chat template."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None
    width: Any = None
    height: Any = None
    steps: Any = None


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/show`. `name` is the older spelling of `model`."""

    model: str = ""
    name: str = ""
    verbose: Any = None
    system: Any = None
    template: Any = None
    options: Any = None


class PullRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/pull`. `name` is the older spelling of `model`."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    insecure: Any = None
    username: Any = None
    password: Any = None


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/create`. `name` is the older spelling of `model`; a model is made by the manifest, so that one of its
    names, with nothing that would change it, is there already."""

    model: str = ""
    name: str = ""
    from_: str | None = msgspec.field(name="from", default=None)
    stream: bool | None = None
    files: Any = None
    adapters: Any = None
    template: Any = None
    license: Any = None
    system: Any = None
    parameters: Any = None
    messages: Any = None
    quantize: Any = None
    modelfile: Any = None
    path: Any = None
    renderer: Any = None
    parser: Any = None
    requires: Any = None
    info: Any = None


CHANGES_A_MODEL: Final = (
    "files",
    "adapters",
    "template",
    "system",
    "parameters",
    "messages",
    "quantize",
    "modelfile",
    "path",
    "renderer",
    "parser",
)
"""What `create` cannot do here: the manifest says all of it."""

_NESTED: Final = {
    "messages": (*Message.__struct_fields__, *PastCall.__struct_fields__, *CalledFunction.__struct_fields__),
    "options": Options.__struct_fields__,
}
CHAT_NAMES: Final = {"": ChatRequest.__struct_fields__, **_NESTED}
GENERATE_NAMES: Final = {"": GenerateRequest.__struct_fields__, **_NESTED}
SHOW_NAMES: Final = {"": ShowRequest.__struct_fields__}
PULL_NAMES: Final = {"": PullRequest.__struct_fields__}
CREATE_NAMES: Final = {"": CreateRequest.__struct_fields__}
"""Field names, for `runner.gateway.decode` to suggest from."""

chat_decoder = msgspec.json.Decoder(ChatRequest)
generate_decoder = msgspec.json.Decoder(GenerateRequest)
show_decoder = msgspec.json.Decoder(ShowRequest)
pull_decoder = msgspec.json.Decoder(PullRequest)
create_decoder = msgspec.json.Decoder(CreateRequest)
