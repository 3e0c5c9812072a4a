"""OpenAI's tools: how a request declares them, and how their calls are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runner.errors import InvalidRequest
from runner.gateway.exchange import new_id
from runner.protocol import ToolCall

FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_.-]+$")]


class Function(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call. `parameters` is a JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tool. Functions are the only kind."""

    function: Function
    type: Literal["function"] = "function"


class FunctionReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function by its name."""

    name: FunctionName


class ToolReference(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """The one tool that has to be called."""

    function: FunctionReference


class Allowed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of the tools; with `required` one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1)]


class AllowedTools(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """The tools that may be called; the model is not shown the others."""

    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | ToolReference | AllowedTools


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was called. `arguments` is JSON text; `parsed_arguments` is what OpenAI's own package adds to it."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str = "{}"
    parsed_arguments: Any = None


class PastCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that the assistant made in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: Any = None


def shown_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[dict[str, Any]] | None:
    """What the model is shown: with `none` nothing, of allowed tools those. Raises InvalidRequest."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"`tools` has two functions called `{name}`", param="tools")
    if choice == "none":
        return None
    chosen = _chosen(choice)
    for name in chosen:
        if name not in names:
            raise InvalidRequest(f"`tool_choice` names `{name}`, which is not in `tools`", param="tool_choice")
    allowed = chosen if isinstance(choice, AllowedTools) else names
    plain: list[dict[str, Any]] = msgspec.to_builtins([tool for tool in tools if tool.function.name in allowed])
    return plain


def _chosen(choice: ToolChoice | None) -> list[str]:
    """The names that a choice gives."""
    if isinstance(choice, AllowedTools):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, ToolReference) else []


def must_call(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[str]:
    """The names of which one has to be called; none where the model is free."""
    if isinstance(choice, ToolReference) or (
        isinstance(choice, AllowedTools) and choice.allowed_tools.mode == "required"
    ):
        return _chosen(choice)
    return [tool.function.name for tool in tools or ()] if choice == "required" else []


def past_calls(calls: Sequence[PastCall]) -> list[dict[str, Any]]:
    """Earlier calls as chat templates read them."""
    return [
        {
            **({"id": call.id} if call.id else {}),
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments or "{}"},
        }
        for call in calls
    ]


def written_call(call: ToolCall) -> dict[str, Any]:
    """A call in a whole answer."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or new_id("call_"), "type": "function", "function": function}
