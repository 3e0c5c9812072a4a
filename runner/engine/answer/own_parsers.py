"""Parsers of tool calls for conventions that upstream has none for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

DEEPSEEK_START: Final = "<｜tool▁calls▁begin｜>"
DEEPSEEK_END: Final = "<｜tool▁calls▁end｜>"
_CALL: Final = re.compile(r"<｜tool▁call▁begin｜>(.*?)(?:<｜tool▁call▁end｜>|$)", re.DOTALL)
_SEPARATOR: Final = "<｜tool▁sep｜>"
_FENCE: Final = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|$)", re.DOTALL)

HARMONY_MARKERS: Final = (
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|constrain|>",
)

INNER: Final[Mapping[str, tuple[str, ...]]] = {
    "deepseek": ("<｜tool▁call▁begin｜>", _SEPARATOR, "<｜tool▁call▁end｜>"),
    "mistral": ("[ARGS]", "[CALL_ID]"),
    "kimi_k2": ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "kimi_k3": ("<|open|>", "<|close|>", "<|sep|>"),
    "gemma4": ('<|"|>',),
    "function_gemma": ("<escape>",),
}
"""Markers inside a call, by convention."""


def parse_llama3(text: str, tools: Any = None) -> list[dict[str, Any]]:
    """Llama 3's calls: one JSON object or several, separated by `;`, commas or lines, with `parameters` or `arguments`.

    Raises ValueError: it is something else.
    """
    rest = text.strip()
    listed = rest.startswith("[")
    rest = rest[1:] if listed else rest
    decoder = json.JSONDecoder()
    calls = []
    while rest := rest.lstrip(" \t\r\n;,"):
        if listed and rest[0] == "]":
            rest = rest[1:]
            listed = False
            continue
        value, end = decoder.raw_decode(rest)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError("not a tool call")
        arguments = value.get("parameters", value.get("arguments", {}))
        calls.append({"name": value["name"], "arguments": arguments})
        rest = rest[end:]
    if not calls:
        raise ValueError("no tool call")
    return calls


def parse_deepseek(text: str, tools: Any = None) -> list[dict[str, Any]]:
    """DeepSeek's calls: `type SEP name` and fenced arguments (V3, R1), or `name SEP arguments` (V3.1 and later).

    Raises ValueError.
    """
    calls = []
    for body in _CALL.findall(text):
        head, separator, tail = body.partition(_SEPARATOR)
        if not separator:
            raise ValueError("a tool call without a separator")
        if fence := _FENCE.search(tail):
            name, arguments = tail[: fence.start()].strip(), fence.group(1)
        else:
            name, arguments = head.strip(), tail.strip()
        calls.append({"name": name, "arguments": json.loads(arguments or "{}")})
    if not calls:
        raise ValueError("no tool call")
    return calls
