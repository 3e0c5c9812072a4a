"""OpenAI's request bodies as types: decoded and validated in one pass, unknown fields refused.

Beside OpenAI's own fields they take what other local runners take under these names: `adapter_name`, `top_k`, `min_p`,
`repetition_penalty`, `repetition_context_size`, `chat_template_kwargs` and `structured_outputs`. A field given as null
is a field not given.

Two kinds of fields are typed `Any`: those that change nothing about the answer and are accepted as they are (HARMLESS),
and those that this version cannot honour: they are refused unless they say what is done anyway (UNSUPPORTED_CHAT,
UNSUPPORTED_COMPLETION: the values that do).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from runner.gateway.openai.tools import Function, PastCall, Tool, ToolChoice

MAX_CHOICES: Final = 128
MAX_STOPS: Final = 16
MAX_LOGPROBS: Final = 20
MAX_TOOLS: Final = 256

HARMLESS: Final = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
"""Accepted and without effect: labels for the caller's own accounts, and hints to a hosted service's scheduler."""

UNSUPPORTED_CHAT: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}

UNSUPPORTED_COMPLETION: Final[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

UNSUPPORTED_MESSAGE: Final[dict[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}
"""Clients send back the assistant's messages as they received them, with these fields null."""

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A piece of a message's content."""

    text: str


class RefusalPart(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"
):
    """What the assistant would not say, in a turn that is sent back."""

    refusal: str


class ImagePart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="image_url"):
    """Known by name, to be refused with a reason."""


class AudioPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_audio"):
    """Known by name, to be refused with a reason."""


class FilePart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="file"):
    """Known by name, to be refused with a reason."""


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[PastCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    parsed: Any = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`include_obfuscation` is accepted and without effect."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`response_format.json_schema`. The schema holds whether `strict` or not; `name` and `description` are labels."""

    schema: msgspec.Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """`response_format` that asks for nothing."""


class JsonObjectFormat(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"
):
    """`response_format` that asks for any JSON object."""


class JsonSchemaFormat(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"
):
    """`response_format` that asks for what a JSON Schema describes."""

    json_schema: JsonSchema


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the answer has to match; exactly one is given. The names are vLLM's.

    `json` is a JSON Schema (or one as a string), `regex` is matched by the whole answer, `choice` lists the possible
    answers, `grammar` is in llguidance's Lark dialect.
    """

    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None


class CommonFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of requests take."""

    model: Name | None = None
    adapter_name: Name | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    max_tokens: Tokens | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    repetition_context_size: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    user: Any = None


class ChatRequest(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`. `prompt` is text or token ids, or a list of either; `best_of` may only repeat `n`, and
    `echo` is for prompts of text, without logprobs."""

    prompt: (
        str
        | Annotated[
            list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]],
            Meta(min_length=1),
        ]
    )
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    suffix: Any = None


_NESTED: Final = {
    "messages": (*Message.__struct_fields__, "type", "text", "function", "arguments"),
    "tools": ("type", "function", *Function.__struct_fields__),
    "response_format": ("type", "json_schema", *JsonSchema.__struct_fields__),
    "stream_options": StreamOptions.__struct_fields__,
    "structured_outputs": StructuredOutputs.__struct_fields__,
}
CHAT_NAMES: Final = {"": ChatRequest.__struct_fields__, **_NESTED}
COMPLETION_NAMES: Final = {"": CompletionRequest.__struct_fields__, **_NESTED}
"""Field names, for `runner.gateway.decode` to suggest from."""

chat_decoder = msgspec.json.Decoder(ChatRequest)
completion_decoder = msgspec.json.Decoder(CompletionRequest)
