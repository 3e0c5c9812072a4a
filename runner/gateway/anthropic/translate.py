"""Anthropic's requests → `Generate`: turns as chat templates know them, and tools in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from runner.errors import InvalidRequest
from runner.gateway.anthropic.wire import (
    UNSUPPORTED,
    Block,
    CountRequest,
    DocumentBlock,
    ImageBlock,
    Message,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)
from runner.gateway.backend import Route
from runner.gateway.formats import format_grammar
from runner.protocol import Generate, Grammar, Sampling

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")

_BILLING: Final = "x-anthropic-billing-header:"


def counting(request: CountRequest, route: Route) -> Generate:
    """A request whose prompt is counted. Raises InvalidRequest."""
    _refuse_unsupported(request)
    messages = _messages(request)
    kwargs = {**route.generation.get("chat_template_kwargs", {}), **_thinking(request)}
    return Generate(
        id=0,
        messages=messages,
        adapter=route.adapter_key,
        chat_template_kwargs=kwargs,
        tools=_tools(request),
        must_call=_must_call(request),
        parallel_tool_calls=not (request.tool_choice and request.tool_choice.disable_parallel_tool_use),
        continue_final=messages[-1]["role"] == "assistant",
        count_only=True,
    )


def generating(request: MessagesRequest, route: Route) -> Generate:
    """A request to be answered. Raises InvalidRequest."""
    chosen = {
        name: route.generation[name] for name in Sampling.__struct_fields__ if route.generation.get(name) is not None
    }
    for name in _SAMPLING:
        if (value := getattr(request, name)) is not None:
            chosen[name] = value
    stop = request.stop_sequences
    if stop is None:
        default = route.generation.get("stop") or []
        stop = [default] if isinstance(default, str) else list(default)
    return msgspec.structs.replace(
        counting(request, route),
        count_only=False,
        max_tokens=request.max_tokens,
        stop=stop,
        sampling=Sampling(**chosen),
        grammar=_grammar(request),
    )


def _grammar(request: MessagesRequest) -> Grammar | None:
    """`output_config.format`, or `output_format`, as it was called first."""
    config = request.output_config
    if config is not None and config.format is not None:
        return format_grammar(config.format, "output_config.format")
    return format_grammar(request.output_format, "output_format")


def _messages(request: CountRequest) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if system := _text_of(request.system or ""):
        turns.append({"role": "system", "content": system})
    for index, message in enumerate(request.messages):
        turns += _turns(message, f"messages[{index}]")
    return turns


def _turns(message: Message, place: str) -> Iterator[dict[str, Any]]:
    """One turn, or several where it carries what tools gave: templates know those as turns of their own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    blocks = message.content
    for index, block in enumerate(blocks):
        _check(message.role, block, f"{place}.content[{index}]")
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block, place)}
    text = "".join(_block_text(block) for block in blocks)
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    thinking = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    if text or calls or thinking or not any(isinstance(block, ToolResultBlock) for block in blocks):
        turn: dict[str, Any] = {"role": message.role, "content": text}
        if calls:
            turn["tool_calls"] = calls
        if thinking:
            turn["reasoning_content"] = thinking
        yield turn


_ASSISTANTS = (ThinkingBlock, RedactedThinkingBlock, ToolUseBlock)


def _check(role: str, block: Block, place: str) -> None:
    if isinstance(block, ImageBlock):
        raise InvalidRequest("this model takes text only, not images", param=place, code="unsupported_content")
    if isinstance(block, _ASSISTANTS) and role != "assistant":
        raise InvalidRequest(f"`{place}`: only the assistant's turns have such a block", param=place)
    if isinstance(block, ToolResultBlock) and role != "user":
        raise InvalidRequest(f"`{place}`: a tool_result belongs to a user's turn", param=place)


def _block_text(block: Block) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock):
        title = f"{block.title}\n" if block.title else ""
        return f"<document>\n{title}{block.source.data}\n</document>\n"
    return ""


def _result_text(block: ToolResultBlock, place: str) -> str:
    if block.content is None or isinstance(block.content, str):
        text = block.content or ""
    else:
        for part in block.content:
            if isinstance(part, ImageBlock):
                raise InvalidRequest("this model takes text only, not images", param=place, code="unsupported_content")
        text = "".join(_block_text(part) for part in block.content)
    return f"Error: {text}" if block.is_error else text


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _text_of(system: str | Sequence[TextBlock]) -> str:
    """The system prompt, without the line that Claude Code puts before it for Anthropic's own accounts.

    No model is to read it, and since it changes from request to request, nothing of what follows on it could be had
    from the prefix cache.
    """
    if isinstance(system, str):
        return system.partition("\n")[2].lstrip() if system.startswith(_BILLING) else system
    return "\n\n".join(block.text for block in system if not block.text.startswith(_BILLING))


def _tools(request: CountRequest) -> list[dict[str, Any]] | None:
    choice = request.tool_choice
    if not request.tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        return None
    names = [tool.name for tool in request.tools]
    if choice is not None and choice.type == "tool" and choice.name not in names:
        raise InvalidRequest(f"`tool_choice` names `{choice.name}`, which is not in `tools`", param="tool_choice.name")
    if choice is not None and choice.type == "none":
        return None
    return [_tool(index, tool) for index, tool in enumerate(request.tools)]


def _must_call(request: CountRequest) -> list[str]:
    choice = request.tool_choice
    if choice is None or choice.type not in ("any", "tool"):
        return []
    return [choice.name] if choice.name else [tool.name for tool in request.tools or ()]


def _tool(index: int, tool: ToolDefinition) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"`tools[{index}]`: `{tool.type}` is a tool of Anthropic's own service, and is not here",
            param=f"tools[{index}].type",
            code="unsupported_field",
        )
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
    if tool.description:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _thinking(request: CountRequest) -> dict[str, Any]:
    """As chat templates read it. Without the field it is the template's own default."""
    kwargs: dict[str, Any] = {}
    if request.thinking is not None:
        kwargs["enable_thinking"] = request.thinking.type != "disabled"
    if request.output_config is not None and request.output_config.effort is not None:
        kwargs["reasoning_effort"] = request.output_config.effort
    return kwargs


def _refuse_unsupported(request: CountRequest) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            message = f"`{name}` is not supported yet by this version"
            raise InvalidRequest(message, param=name, code="unsupported_field")
