"""Grammars that hold a model to its tools: one has to be called, or calls have to fit their schemas.

They are in llguidance's Lark dialect, and write calls as the model's own convention does, so that it stays on the paths
it was taught. Markers that are special tokens stand as their ids, since text can never spell them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from runner.engine.answer.conventions import Conventions
from runner.engine.answer.own_parsers import DEEPSEEK_END, DEEPSEEK_START
from runner.errors import InvalidRequest
from runner.protocol import Grammar

_ANY_OBJECT: Final = {"type": "object"}
_AS_TAUGHT: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, which is how templates show past calls."""


class Tool(msgspec.Struct, frozen=True):
    """A tool as grammars need it: its name, and the schema that its arguments are held to."""

    name: str
    schema: Mapping[str, Any]
    strict: bool

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Tool:
        """From OpenAI's shape."""
        function = tool["function"]
        schema = function.get("parameters") or _ANY_OBJECT
        return cls(function["name"], {"type": "object", **schema}, bool(function.get("strict")))

    @property
    def rule(self) -> str:
        """The arguments. Schemas that are not strict are kept as far as they can be."""
        options = _AS_TAUGHT if self.strict else {**_AS_TAUGHT, "lenient": True}
        return f"%json {json.dumps({**self.schema, 'x-guidance': options})}"


class Writer(msgspec.Struct, frozen=True):
    """Writes grammars for one model. `special` are the ids of markers that are special tokens."""

    conventions: Conventions
    special: Mapping[str, int]
    fenced: bool
    """Whether DeepSeek's template has arguments in a fence."""

    def forced(self, tools: Sequence[Tool], prompt: str, *, several: bool) -> Grammar:
        """At least one of `tools` is called, after reasoning if the model reasons; only one unless `several`.

        Raises InvalidRequest: this convention is not known here well enough.
        """
        calls = self._calls(tools, several=several)
        return _grammar(f"start: {self._thought(prompt)} calls\n{calls}", "tool_choice")

    def strict(self, tools: Sequence[Tool], prompt: str, *, several: bool) -> Grammar | None:
        """Text, or calls that fit their schemas; those of tools that are not strict are any objects.

        None where no tool is strict, and for conventions that cannot be held to it.
        """
        if not any(tool.strict for tool in tools) or self._name not in _WRITERS:
            return None
        loose = [tool if tool.strict else Tool(tool.name, _ANY_OBJECT, False) for tool in tools]
        rules = self._calls(loose, several=several)
        if self.conventions.harmony:
            body = f"({self._thought(prompt)} calls) | {self._thought(prompt)} final"
            return _grammar(f"start: {body}\n{rules}{self._harmony_final()}", "tools")
        convention = self.conventions.tools
        assert convention is not None
        if convention.bare:
            said = r"SAID: /[^\s{\[]/ /(?s:.*)/"
        elif convention.start in self.special:
            said = "SAID: /(?s:.*)/"
        else:
            said = f"SAID: /(?s:.*)/ & ~/(?s:.*){_escaped(convention.start)}(?s:.*)/"
        return _grammar(f"start: {self._thought(prompt)} (calls | SAID calls?)\n{said}\n{rules}", "tools")

    @property
    def _name(self) -> str:
        if self.conventions.harmony:
            return "harmony"
        return "" if self.conventions.tools is None else self.conventions.tools.name

    def _calls(self, tools: Sequence[Tool], *, several: bool) -> str:
        write = _WRITERS.get(self._name)
        if write is None:
            raise InvalidRequest(
                f"calls cannot be forced on this model: it writes them as {self._name or 'nothing known here'}",
                param="tool_choice",
                code="unsupported_by_model",
            )
        return write(self, tools, several)

    def mark(self, marker: str) -> str:
        """A marker in a rule: its token, or its text."""
        token = self.special.get(marker)
        return f"<[{token}]>" if token is not None else json.dumps(marker, ensure_ascii=False)

    def _thought(self, prompt: str) -> str:
        """The rule for reasoning, which may come first."""
        if self.conventions.harmony:
            channel, message, end, start = (self.mark(f"<|{m}|>") for m in ("channel", "message", "end", "start"))
            return f'({channel} "analysis" {message} /(?s:.*)/ {end} {start} "assistant")*'
        think = self.conventions.think
        if think is None:
            return ""
        text = r"/(?s:.*)/" if think[1] in self.special else rf"(/(?s:.*)/ & ~/(?s:.*){_escaped(think[1])}(?s:.*)/)"
        rest = rf"{text} {self.mark(think[1])} /\n*/"
        if prompt.rstrip().endswith(think[0]):
            return rest
        return f"({self.mark(think[0])} {rest})?"

    def _harmony_final(self) -> str:
        return rf'final: {self.mark("<|channel|>")} "final" {self.mark("<|message|>")} /(?s:.*)/' + "\n"


def tool_writer(conventions: Conventions, special: Mapping[int, str], template: str) -> Writer:
    """For a model whose chat template is `template`; `special` are its special markers by id."""
    return Writer(conventions, {text: token for token, text in special.items()}, "```json" in template)


def _grammar(source: str, param: str) -> Grammar:
    return Grammar("lark", source, param)


def _escaped(text: str) -> str:
    """A text inside a regular expression between slashes."""
    return "".join(f"\\{char}" if char in "\\.+*?()|[]{}^$/" else char for char in text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_rules(tools: Sequence[Tool], before: Callable[[Tool], str], after: str) -> str:
    """`call` is one of the tools', with its arguments as JSON between two texts."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        rules.append(f"call_{index}: {before(tool)} arguments_{index} {after}")
        rules.append(f"arguments_{index}: {tool.rule}")
    return "\n".join(rules) + "\n"


def _hermes(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    convention = writer.conventions.tools
    assert convention is not None
    start, end = writer.mark(convention.start), writer.mark(convention.end)
    one = rf"{start} /\n?/ call /\n?/ {end}"
    more = rf"(/\n?/ {one})*" if several else ""
    rules = _json_rules(tools, lambda tool: _quoted(f'{{"name": {_quoted(tool.name)}, "arguments": '), '"}"')
    return f"calls: {one} {more}\n{rules}"


def _llama(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    more = '("; " call)*' if several else ""
    rules = _json_rules(tools, lambda tool: _quoted(f'{{"name": {_quoted(tool.name)}, "parameters": '), '"}"')
    return f"calls: call {more}\n{rules}"


def _mistral(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    start = writer.mark("[TOOL_CALLS]")
    if "[ARGS]" in writer.special:
        more = f"({start} call)*" if several else ""
        rules = _json_rules(tools, lambda tool: f"{_quoted(tool.name)} {writer.mark('[ARGS]')}", "")
        return f"calls: {start} call {more}\n{rules}"
    more = '(", " call)*' if several else ""
    rules = _json_rules(tools, lambda tool: _quoted(f'{{"name": {_quoted(tool.name)}, "arguments": '), '"}"')
    return f'calls: {start} " "? "[" call {more} "]"\n{rules}'


_FENCE: Final = "\n```json\n"


def _deepseek(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    begin, end = writer.mark("<｜tool▁call▁begin｜>"), writer.mark("<｜tool▁call▁end｜>")
    separator = writer.mark("<｜tool▁sep｜>")
    if writer.fenced:

        def before(tool: Tool) -> str:
            return f'{begin} "function" {separator} {_quoted(tool.name + _FENCE)}'

        rules = _json_rules(tools, before, rf'"\n```" {end}')
    else:
        rules = _json_rules(tools, lambda tool: f"{begin} {_quoted(tool.name)} {separator}", end)
    more = r"(/\n?/ call)*" if several else ""
    return f"calls: {writer.mark(DEEPSEEK_START)} call {more} {writer.mark(DEEPSEEK_END)}\n{rules}"


def _kimi(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    begin, end = writer.mark("<|tool_call_begin|>"), writer.mark("<|tool_call_end|>")
    argument = writer.mark("<|tool_call_argument_begin|>")
    rules = _json_rules(tools, lambda tool: rf"{begin} {_quoted(f'functions.{tool.name}:')} /[0-9]+/ {argument}", end)
    section = writer.mark("<|tool_calls_section_begin|>"), writer.mark("<|tool_calls_section_end|>")
    return f"calls: {section[0]} call{'+' if several else ''} {section[1]}\n{rules}"


def _harmony(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    """One call: what would follow it is another turn."""
    channel, constrain, message = (writer.mark(f"<|{name}|>") for name in ("channel", "constrain", "message"))

    def before(tool: Tool) -> str:
        return f'{channel} {_quoted(f"commentary to=functions.{tool.name} ")} {constrain} "json" {message}'

    rules = _json_rules(tools, before, "")
    return f"calls: call\n{rules}"


def _pythonic(writer: Writer, tools: Sequence[Tool], several: bool) -> str:
    """Arguments by name, with JSON values: upstream's parser reads those, too."""
    start, end = writer.mark("<|tool_call_start|>"), writer.mark("<|tool_call_end|>")
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        written = _named_arguments(tool, f"value_{index}", lambda name, value: f"{_quoted(name + '=')} {value}")
        rules.append(f'call_{index}: {_quoted(tool.name + "(")} {written[0]} ")"')
        rules += written[1]
    more = '(", " call)*' if several else ""
    return f'calls: {start} "[" call {more} "]" {end}\n' + "\n".join(rules) + "\n"


def _named_arguments(tool: Tool, prefix: str, write: Callable[[str, str], str]) -> tuple[str, list[str]]:
    """The rule for arguments with commas between them, required ones first, and the rules of their values."""
    properties: Mapping[str, Any] = tool.schema.get("properties") or {}
    required = [name for name in tool.schema.get("required") or () if name in properties]
    optional = [name for name in properties if name not in required]
    values = {name: f"{prefix}_{index}" for index, name in enumerate(properties)}
    rules = [f"{values[name]}: %json {json.dumps(properties[name])}" for name in properties]
    parts = [write(name, values[name]) for name in required]
    rule = ' ", " '.join(parts)
    for name in optional:
        one = write(name, values[name])
        rule += f' (", " {one})?' if rule else f"({one})?"
        if not parts and name == optional[0] and len(optional) > 1:
            # Without a required one to follow, only the first optional one is offered: commas stay simple.
            break
    return rule, rules


_WRITERS: Final[Mapping[str, Callable[[Writer, Sequence[Tool], bool], str]]] = {
    "json_tools": _hermes,
    "llama3": _llama,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "kimi_k2": _kimi,
    "harmony": _harmony,
    "pythonic": _pythonic,
}
