"""Anthropic's request bodies as types: decoded and validated in one pass, unknown fields refused.

Beside Anthropic's own fields they take `adapter_name` and those of the sampler that other local runners take. Fields
that are hints to a hosted service (caching, service tier, containers of its own) are accepted and without effect;
whatever would change the answer and cannot be honoured is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from runner.gateway.openai.wire import Name, Probability, Stop, Tokens

MAX_TOOLS: Final = 256
MAX_STOPS: Final = 16


class _Block(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """`cache_control` is a hint: what can be reused is reused."""

    cache_control: Any = None


class TextBlock(_Block, frozen=True, kw_only=True, tag="text"):
    """Some text."""

    text: str
    citations: Any = None


class ThinkingBlock(_Block, frozen=True, kw_only=True, tag="thinking"):
    """Reasoning of an earlier turn, sent back. `signature` is what we gave it."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block, frozen=True, kw_only=True, tag="redacted_thinking"):
    """Reasoning that another service has encrypted; there is nothing in it for us."""

    data: str = ""


class ToolUseBlock(_Block, frozen=True, kw_only=True, tag="tool_use"):
    """A call that the assistant made in an earlier turn."""

    id: Name
    name: Name
    input: dict[str, Any] = {}
    caller: Any = None
    toolset_name: Any = None


class PlainTextSource(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"
):
    """A document's text."""

    data: str
    media_type: str = "text/plain"


class DocumentBlock(_Block, frozen=True, kw_only=True, tag="document"):
    """A document, of text only."""

    source: PlainTextSource
    title: str | None = None
    context: str | None = None
    citations: Any = None


class ImageBlock(_Block, frozen=True, kw_only=True, tag="image"):
    """Known by name, to be refused with a reason."""

    source: Any = None


class ToolResultBlock(_Block, frozen=True, kw_only=True, tag="tool_result"):
    """What a tool gave."""

    tool_use_id: Name
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None
    toolset_name: Any = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | DocumentBlock | ImageBlock


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation. A system turn may stand among them."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may call. Only the caller's own (`custom`) are known here."""

    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: Any = None
    defer_loading: Any = None
    eager_input_streaming: Any = None
    input_examples: Any = None
    allowed_callers: Any = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which tool has to be called, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether to reason first. The budget is not enforced: the model ends its reasoning itself."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Any = None


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much effort to take, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: Name | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    adapter_name: Name | None = None
    cache_control: Any = None
    context_management: Any = None
    compaction: Any = None
    fallbacks: Any = None
    mcp_servers: Any = None
    output_format: dict[str, Any] | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages`."""

    max_tokens: Tokens
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None
    speed: Any = None
    billing_policy: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    thread: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


HARMLESS: Final = frozenset(
    {
        "billing_policy",
        "cache_control",
        "context_management",
        "diagnostics",
        "fallback_credit_token",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
"""Accepted and without effect: labels, and hints to a hosted service."""

UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "compaction": (),
    "container": (),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "thread": (),
}
"""Refused, but for values that ask for nothing."""

_NESTED: Final = {
    "messages": (*Message.__struct_fields__, *(name for block in Block.__args__ for name in block.__struct_fields__)),
    "tools": ToolDefinition.__struct_fields__,
    "tool_choice": ToolChoice.__struct_fields__,
    "thinking": Thinking.__struct_fields__,
}
MESSAGES_NAMES: Final = {"": MessagesRequest.__struct_fields__, **_NESTED}
COUNT_NAMES: Final = {"": CountRequest.__struct_fields__, **_NESTED}
"""Field names, for `runner.gateway.decode` to suggest from."""

messages_decoder = msgspec.json.Decoder(MessagesRequest)
count_decoder = msgspec.json.Decoder(CountRequest)
