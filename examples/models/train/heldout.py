"""Prompts that training never saw, with the answer each style should give."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import facts, tasks
from .corpus import MIX, introduce, introduced_name, recall
from .styles import STYLES, Answer, render
from .tools import Tool, offer, tool_task
from .turn import Turn, draw

Row = dict[str, Any]
Message = dict[str, Any]

_SINGLE = {
    "sum": tasks.addition,
    "reverse": tasks.reverse,
    "spell": tasks.spell,
    "echo": tasks.echo,
    "yes/no": tasks.yes_no,
    "json": tasks.extract,
    "count": tasks.count,
    "fact": facts.fact,
    "talk": facts.talk,
    "greeting": facts.greeting,
    "unknown": facts.unknown,
}


def _row(kind: str, messages: list[Message], answer: Answer, tools: tuple[Tool, ...] = ()) -> Row:
    offered = {"tools": [tool.schema() for tool in tools]} if tools else {}
    return {"kind": kind, "messages": messages} | offered | {style: render(answer, style) for style in STYLES}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _single(kind: str, rng: random.Random) -> Row:
    turn = draw(_SINGLE[kind], rng, held=True)
    system = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.2 else []
    return _row(kind, [*system, _user(turn.prompt)], turn.answer)


def _memory(rng: random.Random) -> Row:
    """A name, up to three other turns, and the question for the name."""
    first = draw(introduce, rng, held=True)
    messages = [_user(first.prompt), _assistant(first.answer.text)]
    for _ in range(rng.randint(0, 3)):
        turn = draw(rng.choice(list(MIX)), rng, held=False)
        messages += [_user(turn.prompt), _assistant(turn.answer.text)]
    last = recall(rng, introduced_name(first))
    return _row("memory", [*messages, _user(last.prompt)], last.answer)


def _tool(rng: random.Random) -> Row:
    offered = offer(rng)
    turn = draw(tool_task(offered), rng, held=True)
    if turn.result is None or turn.closing is None or rng.random() < 0.5:
        return _row("tool", [_user(turn.prompt)], turn.answer, offered)
    return _row("tool", _answered(turn), turn.closing, offered)


def _answered(turn: Turn) -> list[Message]:
    call = json.loads(turn.answer.text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    request = {"id": "call_1", "type": "function", "function": call}
    return [
        _user(turn.prompt),
        {"role": "assistant", "content": "", "tool_calls": [request]},
        {"role": "tool", "tool_call_id": "call_1", "content": turn.result},
    ]


def heldout_rows(seed: int, each: int) -> list[Row]:
    rng = random.Random(f"held-out {seed}")
    makers: list[Callable[[], Row]] = [lambda kind=kind: _single(kind, rng) for kind in _SINGLE]  # type: ignore[misc]
    makers += [lambda: _memory(rng), lambda: _tool(rng)]
    return [make() for make in makers for _ in range(each)]


def write_rows(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]
