"""OpenAI's requests → `Generate`: the manifest's generation defaults, and the request's values over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from runner.errors import InvalidRequest
from runner.gateway.backend import Route
from runner.gateway.openai.structured import grammar_of
from runner.gateway.openai.tools import must_call, past_calls, shown_tools
from runner.gateway.openai.wire import (
    MAX_CHOICES,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    UNSUPPORTED_MESSAGE,
    AudioPart,
    ChatRequest,
    CommonFields,
    CompletionRequest,
    FilePart,
    ImagePart,
    Message,
    Part,
    RefusalPart,
    TextPart,
)
from runner.protocol import Generate, Sampling

COMPLETION_MAX_TOKENS: Final = 16
"""OpenAI's own default for `/v1/completions`; a chat without `max_tokens` has the context's room."""

_EFFORT: Final[Mapping[str, dict[str, Any]]] = {
    "none": {"enable_thinking": False},
    **{effort: {"reasoning_effort": effort} for effort in ("minimal", "low", "medium", "high", "xhigh")},
}
"""As chat templates read it: some take the effort, most only whether to think at all."""

_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


def chat_generates(request: ChatRequest, route: Route) -> list[Generate]:
    """One `Generate` for each of the `n` choices. Raises InvalidRequest."""
    _refuse_unsupported(request, UNSUPPORTED_CHAT)
    _check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ; send one", param="max_tokens")
    generate = Generate(
        id=0,
        messages=[_message(index, message) for index, message in enumerate(request.messages)],
        adapter=route.adapter_key,
        max_tokens=request.max_completion_tokens or request.max_tokens or route.generation.get("max_tokens", 0),
        stop=_stop(request, route.generation),
        sampling=_sampling(request, route.generation, (request.top_logprobs or 0) if request.logprobs else None),
        grammar=grammar_of(request),
        chat_template_kwargs=_template_kwargs(request, route.generation),
        tools=shown_tools(request.tools, request.tool_choice),
        must_call=must_call(request.tools, request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls is not False,
    )
    return _choices(generate, request.n or 1)


def completion_generates(request: CompletionRequest, route: Route) -> list[Generate]:
    """One `Generate` for each choice: `n` of the first prompt, then of the next. Raises InvalidRequest."""
    _refuse_unsupported(request, UNSUPPORTED_COMPLETION)
    _check_stream_options(request)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise InvalidRequest("`best_of` other than `n` is not supported", param="best_of")
    prompts = _prompts(request)
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts × n {n} are over the limit of {MAX_CHOICES} choices", param="n")
    generates = []
    for prompt in prompts:
        generate = Generate(
            id=0,
            prompt=prompt,
            adapter=route.adapter_key,
            max_tokens=request.max_tokens or route.generation.get("max_tokens", COMPLETION_MAX_TOKENS),
            stop=_stop(request, route.generation),
            sampling=_sampling(request, route.generation, request.logprobs),
            grammar=grammar_of(request),
        )
        generates += _choices(generate, n)
    return generates


def echoes(request: CompletionRequest) -> list[str]:
    """What stands before each choice's text; nothing unless `echo` asks for it. Raises InvalidRequest."""
    if not request.echo:
        return []
    texts = [prompt for prompt in _prompts(request) if isinstance(prompt, str)]
    if request.logprobs is not None:
        raise InvalidRequest("`echo` with `logprobs` is not supported", param="echo", code="unsupported_field")
    if len(texts) < len(_prompts(request)):
        raise InvalidRequest("`echo` needs a `prompt` of text", param="echo", code="unsupported_field")
    return [text for text in texts for _ in range(request.n or 1)]


def _choices(generate: Generate, n: int) -> list[Generate]:
    """`n` times the same; with a seed, each has its own, so that they differ and can be had again."""
    seed = generate.sampling.seed
    if seed is None or n == 1:
        return [generate] * n
    replace = msgspec.structs.replace
    return [replace(generate, sampling=replace(generate.sampling, seed=(seed + index) % 2**63)) for index in range(n)]


def _sampling(request: CommonFields, defaults: Mapping[str, Any], logprobs: int | None) -> Sampling:
    chosen: dict[str, Any] = {name: defaults[name] for name in _SAMPLING if defaults.get(name) is not None}
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            chosen[name] = value
    if chosen.get("top_k") == -1:  # what other runners call "off"
        chosen["top_k"] = 0
    return Sampling(**chosen, logprobs=logprobs)


def _stop(request: CommonFields, defaults: Mapping[str, Any]) -> list[str]:
    stop = defaults.get("stop") if request.stop is None else request.stop
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else list(stop)


def template_effort(effort: str | None) -> dict[str, Any]:
    """How much to think, as chat templates read it."""
    return {} if effort is None else _EFFORT[effort]


def _template_kwargs(request: ChatRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    effort = template_effort(request.reasoning_effort)
    merged = {**defaults.get("chat_template_kwargs", {}), **effort, **(request.chat_template_kwargs or {})}
    if merged:
        try:
            msgspec.msgpack.encode(merged)
        except (OverflowError, RecursionError):
            raise InvalidRequest(
                "`chat_template_kwargs` is nested too deeply or has a number over 64 bits", param="chat_template_kwargs"
            ) from None
    return merged


def _message(index: int, message: Message) -> dict[str, Any]:
    """As chat templates expect it: `developer` is the newer name of `system`, and content is one string."""
    place = f"messages[{index}]"
    _refuse_unsupported(message, UNSUPPORTED_MESSAGE, prefix=f"{place}.")
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"`{place}.content` is missing", param=f"{place}.content", code="missing_field")
        content = message.refusal or ""
    elif not isinstance(content, str):
        content = "".join([_part_text(f"{place}.content[{at}]", part) for at, part in enumerate(content)])
    rendered: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = past_calls(message.tool_calls)
    if reasoning := _reasoning(message):
        rendered["reasoning_content"] = reasoning
    return rendered


def _part_text(place: str, part: Part) -> str:
    if isinstance(part, TextPart | RefusalPart):
        return part.text if isinstance(part, TextPart) else part.refusal
    kind = {ImagePart: "images", AudioPart: "audio", FilePart: "files"}[type(part)]
    raise InvalidRequest(f"this model takes text only, not {kind}", param=place, code="unsupported_content")


def _reasoning(message: Message) -> str | None:
    return message.reasoning_content or message.reasoning


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if len(prompts) != len(prompt):
        raise InvalidRequest("`prompt`: token ids and prompts cannot be mixed in one list", param="prompt")
    return prompts


def _check_stream_options(request: CommonFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")


def _refuse_unsupported(
    fields: CommonFields | Message, unsupported: Mapping[str, tuple[Any, ...]], *, prefix: str = ""
) -> None:
    for name, neutral in unsupported.items():
        value = getattr(fields, name)
        if value is not None and value not in neutral:
            message = f"`{prefix}{name}` is not supported yet by this version"
            raise InvalidRequest(message, param=f"{prefix}{name}", code="unsupported_field")
