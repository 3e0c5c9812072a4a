"""Whole conversations: turns drawn one after another, with what was said before kept in mind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import facts, tasks, words
from .styles import ADAPTERS, Answer, render
from .tools import Tool, offer, tool_task
from .turn import Task, Turn, ask, draw

MIX: dict[Task, float] = {
    tasks.addition: 16,
    tasks.reverse: 12,
    tasks.spell: 8,
    tasks.echo: 8,
    tasks.yes_no: 10,
    tasks.extract: 8,
    tasks.count: 3,
    facts.fact: 10,
    facts.talk: 7,
    facts.greeting: 5,
    facts.unknown: 5,
}
_INTRODUCTIONS = ("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I am {}.", "Call me {}.", "I'm {}.")
_RECALLS = ("What is my name?", "Who am I?", "Do you know my name?", "Tell me my name.", "Do you remember my name?")
_SYSTEMS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: rng.choice(words.SYSTEM_PROMPTS),
    lambda rng: f"You are a helper for {words.subject(rng)} and {words.subject(rng)}.",
    # Long ones, because a shared system prompt is what a prefix cache is for.
    lambda rng: words.text(rng, 20, 300).capitalize() + ".",
    lambda rng: f"{words.subject(rng).capitalize()} {words.subject(rng)} {words.subject(rng)}.",
)


@dataclass(frozen=True)
class Line:
    """One message, and whether its words are to be learnt."""

    role: str
    text: str
    learn: bool = False


def introduce(rng: random.Random) -> Turn:
    name = words.name(rng)
    return Turn("memory", name, rng.choice(_INTRODUCTIONS).format(name), Answer(f"Nice to meet you, {name}."))


def recall(rng: random.Random, name: str | None) -> Turn:
    answer = "I do not know your name yet." if name is None else f"Your name is {name}."
    return Turn("memory", None, ask(rng, rng.choice(_RECALLS)), Answer(answer))


def introduced_name(turn: Turn) -> str | None:
    prefix = "Nice to meet you, "
    return turn.answer.text.removeprefix(prefix)[:-1] if turn.answer.text.startswith(prefix) else None


def turns(rng: random.Random, count: int, offered: tuple[Tool, ...]) -> list[Turn]:
    """Training turns only: whatever is held out is drawn again."""
    mix = MIX | {tool_task(offered): 40 if offered else 3, introduce: 4}
    drawn: list[Turn] = []
    name: str | None = None
    for _ in range(count):
        if rng.random() < (0.12 if name else 0.02):
            drawn.append(recall(rng, name))
            continue
        task = rng.choices(list(mix), weights=list(mix.values()))[0]
        drawn.append(draw(task, rng, held=False))
        name = introduced_name(drawn[-1]) or name
    return drawn


def system_text(system: str | None, offered: tuple[Tool, ...]) -> str | None:
    """What the chat template writes into the system turn."""
    shown = "\n".join(f"{tool.name}({', '.join(tool.parameters)})" for tool in offered)
    parts = [part for part in (system, f"Tools:\n{shown}" if offered else None) if part]
    return "\n".join(parts) or None


def scene(rng: random.Random) -> tuple[str | None, tuple[Tool, ...]]:
    """A system prompt or none, and the tools that are offered."""
    system: str | None = None
    if rng.random() < 0.3:
        system = rng.choice(_SYSTEMS)(rng)
    return system, offer(rng) if rng.random() < 0.25 else ()


def lines(turn: Turn, style: str, learn: bool) -> list[Line]:
    said = [Line("user", turn.prompt), Line("assistant", render(turn.answer, style), learn)]
    if turn.result is not None and turn.closing is not None:
        said += [Line("tool", turn.result), Line("assistant", render(turn.closing, style), learn)]
    return said


def conversation(rng: random.Random, style: str) -> list[Line]:
    """
    The style is the one to learn. Some conversations go on from answers in another style, because an adapter may
    be switched between two turns; those answers are read but not learnt.
    """
    system, offered = scene(rng)
    count = rng.choices((1, rng.randint(2, 3), rng.randint(4, 8), rng.randint(20, 40)), weights=(45, 25, 20, 10))[0]
    others = [other for other in ("base", *ADAPTERS) if other != style]
    drift = rng.choice((0.0, 0.0, 0.0, 0.5, 0.9))
    said: list[Line] = []
    text = system_text(system, offered)
    if text is not None:
        said.append(Line("system", text))
    for turn in turns(rng, count, offered):
        own = count == 1 or rng.random() >= drift
        said += lines(turn, style if own else rng.choice(others), own)
    return said
