"""Ollama's requests → `Generate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.errors import InvalidRequest
from runner.gateway.backend import Route
from runner.gateway.formats import any_object, schema_grammar
from runner.gateway.ollama.wire import (
    UNSUPPORTED_OPTIONS,
    ChatRequest,
    GenerateRequest,
    Message,
    Options,
    Tool,
)
from runner.protocol import Generate, Grammar, Sampling

_RENAMED = {"repeat_penalty": "repetition_penalty", "repeat_last_n": "repetition_context_size"}
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")


def chat_generate(request: ChatRequest, route: Route) -> Generate:
    """A conversation to be answered. Raises InvalidRequest."""
    options = request.options or Options()
    return Generate(
        id=0,
        messages=[_message(index, message) for index, message in enumerate(request.messages or ())],
        adapter=route.adapter_key,
        max_tokens=_max_tokens(options, route.generation),
        stop=_stop(options, route.generation),
        sampling=_sampling(options, route.generation, _logprobs(request)),
        grammar=_grammar(request),
        chat_template_kwargs=_kwargs(request, route.generation),
        tools=[_tool(tool) for tool in request.tools] if request.tools else None,
    )


def prompt_generate(request: GenerateRequest, route: Route) -> Generate:
    """A prompt to be answered, or continued if it is raw. Raises InvalidRequest."""
    for name in ("suffix", "template", "context", "images"):
        if getattr(request, name):
            raise InvalidRequest(f"`{name}` is not supported by this version", param=name, code="unsupported_field")
    options = request.options or Options()
    messages: list[dict[str, Any]] | None = None
    if not request.raw:
        system = [{"role": "system", "content": request.system}] if request.system else []
        messages = [*system, {"role": "user", "content": request.prompt}]
    return Generate(
        id=0,
        messages=messages,
        prompt=request.prompt if request.raw else None,
        adapter=route.adapter_key,
        max_tokens=_max_tokens(options, route.generation),
        stop=_stop(options, route.generation),
        sampling=_sampling(options, route.generation, _logprobs(request)),
        grammar=_grammar(request),
        chat_template_kwargs={} if request.raw else _kwargs(request, route.generation),
    )


def _message(index: int, message: Message) -> dict[str, Any]:
    if message.images:
        place = f"messages[{index}].images"
        raise InvalidRequest("this model takes text only, not images", param=place, code="unsupported_content")
    turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                },
            }
            for call in message.tool_calls
        ]
    if message.thinking:
        turn["reasoning_content"] = message.thinking
    if message.tool_name:
        turn["name"] = message.tool_name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.function.name, "parameters": tool.function.parameters or {"type": "object"}}
    if tool.function.description:
        function["description"] = tool.function.description
    return {"type": "function", "function": function}


def _sampling(options: Options, defaults: Mapping[str, Any], logprobs: int | None) -> Sampling:
    for name, neutral in UNSUPPORTED_OPTIONS.items():
        value = getattr(options, name)
        if value is not None and value not in neutral:
            message = f"`options.{name}` is not supported by this version"
            raise InvalidRequest(message, param=f"options.{name}", code="unsupported_field")
    known = set(Sampling.__struct_fields__)
    chosen = {name: value for name, value in defaults.items() if name in known and value is not None}
    for name in (*_SAME, *_RENAMED):
        if (value := getattr(options, name)) is not None:
            chosen[_RENAMED.get(name, name)] = value
    if options.seed == -1:  # what Ollama's clients call "any"
        chosen.pop("seed")
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    if chosen.get("repetition_context_size") == -1:
        chosen["repetition_context_size"] = 2**31 - 1
    return Sampling(**{**chosen, "logprobs": logprobs})


def _logprobs(request: ChatRequest | GenerateRequest) -> int | None:
    return (request.top_logprobs or 0) if request.logprobs else None


def _max_tokens(options: Options, defaults: Mapping[str, Any]) -> int:
    if options.num_predict is None:
        return int(defaults.get("max_tokens") or 0)
    return max(options.num_predict, 0)


def _stop(options: Options, defaults: Mapping[str, Any]) -> list[str]:
    stop = options.stop if options.stop is not None else defaults.get("stop")
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else list(stop)


def _kwargs(request: ChatRequest | GenerateRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = dict(defaults.get("chat_template_kwargs", {}))
    if isinstance(request.think, str):
        kwargs |= {"enable_thinking": True, "reasoning_effort": request.think}
    elif request.think is not None:
        kwargs["enable_thinking"] = request.think
    return kwargs


def _grammar(request: ChatRequest | GenerateRequest) -> Grammar | None:
    """`format` is "json", or a JSON Schema."""
    if request.format in (None, ""):
        return None
    if request.format == "json":
        return any_object("format")
    if isinstance(request.format, str):
        raise InvalidRequest('`format` should be "json" or a JSON Schema', param="format", code="invalid_value")
    return schema_grammar(request.format, "format")
