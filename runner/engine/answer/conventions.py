"""How a model writes tool calls and reasoning: found in its chat template and vocabulary.

The parsers of single calls are upstream's (`mlx_lm.tool_parsers`), and our own for conventions that upstream has none
for. Which one a model needs can be told from the markers that its template writes into past turns, since it was
trained on those.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import msgspec

from runner.engine.answer import own_parsers
from runner.errors import EngineLoadError

Parse = Callable[[str, Any], Any]
"""Text between the markers, and the request's tools, to a call or a list of calls: {"name", "arguments"}."""


class ToolConvention(msgspec.Struct, frozen=True):
    """`start` and `end` are around one call or several; an empty `end` is the end of the answer.

    With `bare`, an answer that begins with `{` or `[` may be a call without markers.
    """

    name: str
    start: str
    end: str
    parse: Parse
    bare: bool = False


class Conventions(msgspec.Struct, frozen=True):
    """What is known of a model's way to write. `think` is the pair of markers around its reasoning.

    `harmony` models write everything in channels, each of which says what it is for.
    """

    tools: ToolConvention | None = None
    think: tuple[str, str] | None = None
    harmony: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that have to be seen, even where the vocabulary has them as special tokens."""
        if self.harmony:
            return own_parsers.HARMONY_MARKERS
        tools = (
            ()
            if self.tools is None
            else (self.tools.start, self.tools.end, *own_parsers.INNER.get(self.tools.name, ()))
        )
        return tuple(marker for marker in (*tools, *(self.think or ())) if marker)


_OWN: Final[Mapping[str, ToolConvention]] = {
    "llama3": ToolConvention("llama3", "<|python_tag|>", "", own_parsers.parse_llama3, bare=True),
    "deepseek": ToolConvention(
        "deepseek", own_parsers.DEEPSEEK_START, own_parsers.DEEPSEEK_END, own_parsers.parse_deepseek
    ),
}

UPSTREAM: Final = (
    "function_gemma",
    "gemma4",
    "glm47",
    "json_tools",
    "kimi_k2",
    "kimi_k3",
    "laguna",
    "longcat",
    "minicpm5",
    "minimax_m2",
    "mistral",
    "muse_spark",
    "pythonic",
    "qwen3_coder",
)
"""Modules of mlx_lm.tool_parsers."""

TOOL_PARSERS: Final = tuple(sorted((*_OWN, *UPSTREAM, "harmony")))
"""What `tool_parser` may name."""

# The first whose markers are all in the template decides: the more telling ones come first.
_IN_TEMPLATE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek", (own_parsers.DEEPSEEK_START,)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>", "name")),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("<|eot_id|>", '"parameters"')),
)

_IN_VOCABULARY: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("pythonic", ("<|tool_call_start|>", "<|tool_call_end|>")),
)

_THINKING: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)


def tool_convention(name: str) -> ToolConvention:
    """The convention of that name. Raises EngineLoadError, listing those there are."""
    if name in _OWN:
        return _OWN[name]
    if name not in UPSTREAM:
        raise EngineLoadError(f"no tool parser is called {name!r}; there are {', '.join(TOOL_PARSERS)}")
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return ToolConvention(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def conventions(template: str, vocabulary: Collection[str], override: str = "") -> Conventions:
    """What `template` (its source) and the vocabulary's tokens tell. `override` names a tool parser.

    Raises EngineLoadError when there is no parser of that name.
    """
    name = override or _guess(template, vocabulary)
    think = next((pair for pair in _THINKING if all(_known(m, template, vocabulary) for m in pair)), None)
    if name == "harmony":
        return Conventions(harmony=True)
    return Conventions(tool_convention(name) if name else None, think)


def _guess(template: str, vocabulary: Collection[str]) -> str:
    for name, markers in _IN_TEMPLATE:
        if all(marker in template for marker in markers):
            return name
    if "tools" in template or "tool_call" in template:
        return next((name for name, markers in _IN_VOCABULARY if all(m in vocabulary for m in markers)), "")
    return ""


def _known(marker: str, template: str, vocabulary: Collection[str]) -> bool:
    return marker in vocabulary or marker in template
