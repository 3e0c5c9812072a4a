"""What an answer is made of, and how a call's text becomes a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from runner.engine.answer.conventions import ToolConvention
from runner.engine.answer.repair import repaired
from runner.engine.characters import whole_characters

Kind = Literal["content", "reasoning", "call"]


class Call(msgspec.Struct, frozen=True):
    """One tool call. `arguments` is JSON text; `id` is the model's own, "" where it gives none."""

    name: str
    arguments: str
    id: str = ""


class Piece(msgspec.Struct, frozen=True):
    """Some text of a kind, or a call."""

    kind: Kind
    text: str = ""
    call: Call | None = None


class Parser(Protocol):
    """Takes one row's text apart."""

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is reasoning."""
        ...

    def feed(self, text: str) -> list[Piece]:
        """What is certain now."""
        ...

    def finish(self, *, cut: bool) -> list[Piece]:
        """What is left when nothing more will come. `cut`: the answer hit a limit, so a call without its end is
        not one: what an argument would have become is not known."""
        ...


def read_calls(tool: ToolConvention, body: str, tools: Sequence[Any] | None, *, mend: bool = True) -> list[Call] | None:
    """The calls in the text between two markers; None where none can be read, not even with `mend`ed JSON."""
    for text in (body, *(repaired(body) if mend else ())):
        try:
            parsed = tool.parse(text, tools)
        except Exception:  # noqa: BLE001, S112 - upstream's parsers raise whatever they trip over
            continue
        calls = [_call(entry) for entry in (parsed if isinstance(parsed, list) else [parsed])]
        known = [call for call in calls if call is not None]
        if known and len(known) == len(calls):
            return known
    return None


def _call(entry: Any) -> Call | None:
    if not isinstance(entry, dict):
        return None
    name, arguments = entry.get("name"), entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # NaN is Python's alone: a client's JSON has none
        return None
    own = entry.get("id")
    return Call(
        whole_characters(name), whole_characters(written), whole_characters(own) if isinstance(own, str) else ""
    )
