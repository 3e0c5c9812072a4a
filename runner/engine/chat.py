"""Messages to a prompt, through the model's own chat template.

Templates come from the hub, so they run in jinja's sandbox and see plain JSON values only. What they find in scope is
what transformers gives them: `messages`, `tools`, `documents`, `add_generation_prompt`, the named special tokens,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, `{% generation %}` blocks and loop controls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import msgspec

from runner.engine.characters import whole_characters
from runner.errors import InvalidRequest

Messages = list[dict[str, Any]]


class Render(msgspec.Struct, frozen=True):
    """A template: messages and variables to text. `source` is empty where it is code, not jinja."""

    call: Callable[[Messages, dict[str, Any]], str]
    source: str = ""

    def __call__(self, messages: Messages, variables: dict[str, Any]) -> str:
        """The text."""
        return self.call(messages, variables)


class ChatTemplate:
    """Renders requests. `render` is the template, None where the model has none."""

    def __init__(self, render: Render | None) -> None:
        self._render = render

    @property
    def source(self) -> str:
        """The template's text, empty where there is none to be seen."""
        return "" if self._render is None else self._render.source

    def prompt(self, messages: Messages, variables: Mapping[str, Any], *, continue_final: bool = False) -> str:
        """The prompt's text. A generation prompt is added unless `variables` say otherwise.

        With `continue_final` it ends with the last message, the assistant's, which the model goes on with. Raises
        InvalidRequest: no template, or the template refuses the messages (with its own message).
        """
        if not continue_final:
            return self._prompt(messages, variables)
        begun = str(_plain(messages[-1]).get("content", "")).rstrip() if messages else ""
        text = self._prompt(messages, {**variables, "add_generation_prompt": False})
        end = text.rfind(begun)
        if not begun or end < 0:
            raise InvalidRequest("the last message has no text to go on from", param="messages")
        return text[: end + len(begun)]

    def _prompt(self, messages: Messages, variables: Mapping[str, Any]) -> str:
        if self._render is None:
            raise InvalidRequest(
                "this model has no chat template; send text to /v1/completions instead",
                param="messages",
                code="no_chat_template",
            )
        if not messages:
            raise InvalidRequest("messages is empty", param="messages")
        try:
            text = self._render([_plain(m) for m in messages], {"add_generation_prompt": True, **variables})
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error.message or error}", param="messages"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            # A template that trips over a message, as `message.content + x` does when content is no string.
            raise InvalidRequest(f"the chat template fails on these messages: {error}", param="messages") from error
        return whole_characters(text)


def jinja_render(source: str, special_tokens: Mapping[str, str]) -> Render:
    """A renderer for a template's source. Raises jinja2.TemplateSyntaxError."""
    template = _environment().from_string(source)

    def render(messages: Messages, variables: dict[str, Any]) -> str:
        scope = {"tools": None, "documents": None, **special_tokens, **variables}
        return template.render(messages=messages, **scope)

    return Render(render, source)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it.

    Keys without a value are left out (templates test for presence), text parts become one string, the arguments of
    tool calls become objects, and reasoning is found under every name that templates read it by.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(_part_text(part) for part in plain["content"])
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_tool_call(call) for call in calls]
    for name in ("reasoning_content", "thinking", "reasoning"):
        if (reasoning := plain.get(name)) is not None:
            return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequest(f"this model takes text only, not content of type {kind!r}", param="messages")


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments arrive as a JSON string and templates write them with `tojson`."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Jinja's hook."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        for name in dict(*rest, **kwargs):
            _reject_private(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_private(name)
        super().__setitem__(name, value)


def _reject_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} on a namespace")


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
