"""The Responses API's request body as types.

Items of `input` are decoded one by one, since a message may leave out its `type`. As elsewhere: a field is honoured,
harmless, or refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from runner.gateway.openai.tools import FunctionName
from runner.gateway.openai.wire import MAX_LOGPROBS, Name, Probability, Tokens

MAX_TOOLS: Final = 256


class _Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """`id` and `status` come back from earlier answers."""

    id: str | None = None
    status: Any = None


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A piece of an item's content."""


class InputText(_Part, frozen=True, kw_only=True, tag="input_text"):
    """What the user said."""

    text: str
    prompt_cache_breakpoint: Any = None


class OutputText(_Part, frozen=True, kw_only=True, tag="output_text"):
    """What the assistant said."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class RefusalPart(_Part, frozen=True, kw_only=True, tag="refusal"):
    """What the assistant would not say."""

    refusal: str


class InputImage(_Part, frozen=True, kw_only=True, tag="input_image"):
    """Known by name, to be refused with a reason."""

    image_url: Any = None
    file_id: Any = None
    detail: Any = None


class InputFile(_Part, frozen=True, kw_only=True, tag="input_file"):
    """Known by name, to be refused with a reason."""

    file_data: Any = None
    file_id: Any = None
    file_url: Any = None
    filename: Any = None
    detail: Any = None


Part = InputText | OutputText | RefusalPart | InputImage | InputFile


class MessageItem(_Item, frozen=True, kw_only=True, tag="message"):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: Any = None


class FunctionCallItem(_Item, frozen=True, kw_only=True, tag="function_call"):
    """A call that the assistant made. `arguments` is JSON text."""

    call_id: Name
    name: Name
    arguments: str
    namespace: Any = None


class FunctionOutputItem(_Item, frozen=True, kw_only=True, tag="function_call_output"):
    """What a call gave."""

    call_id: Name
    output: str | list[Part]


class SummaryText(_Part, frozen=True, kw_only=True, tag="summary_text"):
    """A summary of reasoning."""

    text: str


class ReasoningText(_Part, frozen=True, kw_only=True, tag="reasoning_text"):
    """Reasoning itself."""

    text: str


class ReasoningItem(_Item, frozen=True, kw_only=True, tag="reasoning"):
    """How the assistant came to what it said or called next."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: Any = None


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call. Functions are the only kind of tool here."""

    name: FunctionName
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Any = None


class FunctionChoice(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """The one function that has to be called."""

    name: FunctionName


class AllowedTools(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """The functions that may be called; with `required` one of them has to be. The model is not shown the others."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Meta(min_length=1)]


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much to think. A summary is not made: the reasoning itself comes back."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Any = None
    generate_summary: Any = None
    context: Any = None


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: Any = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses`."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: Name | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_output_tokens: Tokens | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    metadata: dict[str, Any] | None = None
    adapter_name: Name | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Any = None
    context_management: Any = None
    conversation: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    stream_options: Any = None
    user: Any = None


HARMLESS: Final = frozenset(
    {
        "include",
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    }
)
"""Accepted and without effect: labels and hints. `max_tool_calls` limits a hosted service's own tools only."""

UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
}
"""Refused, but for values that ask for nothing."""

NAMES: Final = {
    "": ResponsesRequest.__struct_fields__,
    "tools": FunctionTool.__struct_fields__,
    "reasoning": Reasoning.__struct_fields__,
    "text": Text.__struct_fields__,
    "input": sorted({name for item in Item.__args__ for name in item.__struct_fields__}),
}
"""Field names, for `runner.gateway.decode` to suggest from."""

responses_decoder = msgspec.json.Decoder(ResponsesRequest)
