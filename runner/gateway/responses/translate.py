"""The Responses API's requests → `Generate`: items become turns as chat templates know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.errors import InvalidRequest
from runner.gateway.backend import Route
from runner.gateway.decode import convert
from runner.gateway.formats import format_grammar
from runner.gateway.openai.translate import template_effort
from runner.gateway.responses.wire import (
    NAMES,
    UNSUPPORTED,
    AllowedTools,
    FunctionCallItem,
    FunctionChoice,
    FunctionOutputItem,
    InputFile,
    InputImage,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalPart,
    ResponsesRequest,
)
from runner.protocol import Generate, Sampling

Turns = list[dict[str, Any]]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


def input_turns(request: ResponsesRequest) -> Turns:
    """The request's own turns, without its instructions. Raises InvalidRequest."""
    if isinstance(request.input, str):
        return [{"role": "user", "content": request.input}]
    items: list[Item] = []
    for index, raw in enumerate(request.input):
        if raw.get("type") == "item_reference":
            raise InvalidRequest(
                "item references are not kept here; send the item, or `previous_response_id`",
                param=f"input[{index}]",
                code="unsupported_field",
            )
        item: Item = convert({"type": "message", **raw}, Item, f"input[{index}]", NAMES)
        items.append(item)
    return turns_of(items)


def turns_of(items: Sequence[Item]) -> Turns:
    """Items as turns: reasoning and calls belong to the assistant's turn around them."""
    turns: Turns = []
    reasoning = ""
    for index, item in enumerate(items):
        place = f"input[{index}]"
        match item:
            case ReasoningItem():
                reasoning += "".join(part.text for part in item.content or item.summary)
            case FunctionCallItem():
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments or "{}"},
                }
                turn = turns[-1] if turns and turns[-1]["role"] == "assistant" else _assistant(turns)
                turn.setdefault("tool_calls", []).append(call)
            case FunctionOutputItem():
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, place)})
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                turns.append({"role": role, "content": _text(item.content, place)})
        if reasoning and turns and turns[-1]["role"] == "assistant" and not isinstance(item, ReasoningItem):
            turns[-1]["reasoning_content"] = reasoning
            reasoning = ""
    return turns


def generating(request: ResponsesRequest, route: Route, turns: Turns) -> Generate:
    """A request to be answered after `turns`. Raises InvalidRequest."""
    _refuse_unsupported(request)
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    known = set(Sampling.__struct_fields__)
    chosen = {name: value for name, value in route.generation.items() if name in known and value is not None}
    for name in _SAMPLING:
        if (value := getattr(request, name)) is not None:
            chosen[name] = value
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    stop = route.generation.get("stop") or []
    effort = template_effort(request.reasoning.effort if request.reasoning else None)
    return Generate(
        id=0,
        messages=[*system, *turns],
        adapter=route.adapter_key,
        max_tokens=request.max_output_tokens or route.generation.get("max_tokens", 0),
        stop=[stop] if isinstance(stop, str) else list(stop),
        sampling=Sampling(**{**chosen, "logprobs": request.top_logprobs if _wants_logprobs(request) else None}),
        grammar=None if request.text is None else format_grammar(request.text.format, "text.format"),
        chat_template_kwargs={
            **route.generation.get("chat_template_kwargs", {}),
            **effort,
            **(request.chat_template_kwargs or {}),
        },
        tools=_tools(request),
        must_call=_must_call(request),
        parallel_tool_calls=request.parallel_tool_calls is not False,
    )


def _wants_logprobs(request: ResponsesRequest) -> bool:
    asked = request.include is not None and "message.output_text.logprobs" in request.include
    return asked or bool(request.top_logprobs)


def _assistant(turns: Turns) -> dict[str, Any]:
    turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _text(content: str | Sequence[Part], place: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        if isinstance(part, InputImage | InputFile):
            kind = "images" if isinstance(part, InputImage) else "files"
            raise InvalidRequest(
                f"this model takes text only, not {kind}", param=f"{place}.content[{index}]", code="unsupported_content"
            )
        texts.append(part.refusal if isinstance(part, RefusalPart) else part.text)
    return "".join(texts)


def _tools(request: ResponsesRequest) -> list[dict[str, Any]] | None:
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        return None
    names = [tool.name for tool in request.tools]
    for name in _chosen(request):
        if name not in names:
            raise InvalidRequest(f"`tool_choice` names `{name}`, which is not in `tools`", param="tool_choice.name")
    if choice == "none":
        return None
    allowed = _chosen(request) if isinstance(choice, AllowedTools) else names
    shown: list[dict[str, Any]] = []
    for tool in (tool for tool in request.tools if tool.name in allowed):
        function: dict[str, Any] = {"name": tool.name}
        for field in ("description", "parameters", "strict"):
            if (value := getattr(tool, field)) is not None:
                function[field] = value
        shown.append({"type": "function", "function": function})
    return shown


def _chosen(request: ResponsesRequest) -> list[str]:
    """The names that `tool_choice` gives."""
    choice = request.tool_choice
    if isinstance(choice, AllowedTools):
        return [tool.name for tool in choice.tools]
    return [choice.name] if isinstance(choice, FunctionChoice) else []


def _must_call(request: ResponsesRequest) -> list[str]:
    choice = request.tool_choice
    if isinstance(choice, FunctionChoice) or (isinstance(choice, AllowedTools) and choice.mode == "required"):
        return _chosen(request)
    return [tool.name for tool in request.tools or ()] if request.tool_choice == "required" else []


def _refuse_unsupported(request: ResponsesRequest) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            message = f"`{name}` is not supported by this version"
            raise InvalidRequest(message, param=name, code="unsupported_field")
