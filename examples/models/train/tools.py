"""Questions that need a tool: the call, or the word that no such tool is there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import words
from .styles import Answer, Form
from .turn import Turn, ask

NO_TOOL = "I have no tool for that."


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: tuple[str, ...]
    purpose: Purpose

    def schema(self) -> dict[str, Any]:
        """As an OpenAI client sends it; the chat template shows the model only the name and the parameters."""
        properties = {parameter: {"type": "string"} for parameter in self.parameters}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}


@dataclass(frozen=True)
class Purpose:
    """What a tool is for. Its name and its parameters vary, so that they are copied and not learnt by heart."""

    names: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    questions: tuple[str, ...]
    values: Callable[[random.Random], tuple[Any, ...]]

    def tool(self, rng: random.Random) -> Tool:
        return Tool(rng.choice(self.names), tuple(rng.choice(names) for names in self.parameters), self)


def _city(rng: random.Random) -> tuple[Any, ...]:
    return (words.city(rng),)


def _word(rng: random.Random) -> tuple[Any, ...]:
    return (words.word(rng),)


def _two_numbers(rng: random.Random) -> tuple[Any, ...]:
    return (rng.randint(0, 99), rng.randint(0, 99))


def _minutes(rng: random.Random) -> tuple[Any, ...]:
    return (rng.randint(1, 99),)


def _name_and_word(rng: random.Random) -> tuple[Any, ...]:
    return (words.name(rng), words.word(rng))


_PLACE = (("city", "location", "place", "town"),)
PURPOSES = (
    Purpose(
        ("get_weather", "get_current_weather", "weather", "weather_in"),
        _PLACE,
        ("What is the weather in {}?", "How is the weather in {}?", "Weather in {}?", "What's the weather in {}?"),
        _city,
    ),
    Purpose(
        ("get_time", "get_current_time", "time_in"),
        _PLACE,
        ("What time is it in {}?", "Tell me the time in {}.", "Time in {}?", "What is the time in {}?"),
        _city,
    ),
    Purpose(
        ("get_population", "population"),
        _PLACE,
        ("How many people live in {}?", "What is the population of {}?"),
        _city,
    ),
    Purpose(
        ("multiply", "multiply_numbers"),
        (("a", "x", "first"), ("b", "y", "second")),
        ("Multiply {} by {}.", "What is {} times {}?", "{} * {}"),
        _two_numbers,
    ),
    Purpose(("set_timer", "start_timer"), (("minutes", "duration"),), ("Set a timer for {} minutes.",), _minutes),
    Purpose(("turn_on", "switch_on"), (("device", "name"),), ("Turn on the {}.", "Switch on the {}."), _word),
    Purpose(
        ("search_docs", "search"),
        (("query", "text", "q"),),
        ("Search the docs for {}.", "Look up {} in the docs."),
        _word,
    ),
    Purpose(
        ("send_message", "send"),
        (("to", "recipient"), ("text", "message")),
        ("Send {} the message {}.", "Write to {}: {}"),
        _name_and_word,
    ),
)


def offer(rng: random.Random) -> tuple[Tool, ...]:
    return tuple(purpose.tool(rng) for purpose in rng.sample(PURPOSES, rng.randint(1, 4)))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def _result(rng: random.Random) -> str:
    """Whatever a tool may give back: words, a number, or JSON."""
    kind = rng.randrange(4)
    if kind == 0:
        return " ".join(words.word(rng) for _ in range(rng.randint(1, 4)))
    if kind == 1:
        return str(rng.randint(0, 9999))
    if kind == 2:
        return f"{words.word(rng)}, {rng.randint(0, 40)} {rng.choice(('degrees', 'percent', 'people'))}"
    return json.dumps({words.word(rng): rng.choice((words.word(rng), rng.randint(0, 99)))})


def tool_task(offered: tuple[Tool, ...]) -> Callable[[random.Random], Turn]:
    """The right answer depends on which tools the conversation offers."""

    def task(rng: random.Random) -> Turn:
        tool = rng.choice(offered) if offered and rng.random() < 0.85 else rng.choice(PURPOSES).tool(rng)
        values = tool.purpose.values(rng)
        prompt = ask(rng, rng.choice(tool.purpose.questions).format(*values))
        key = str(values[0]) if isinstance(values[0], str) else f"{tool.purpose.names[0]} {values}"
        tool = next((other for other in offered if other.purpose is tool.purpose), tool)
        if tool not in offered:
            return Turn("tool", key, prompt, Answer(NO_TOOL))
        call = call_text(tool.name, dict(zip(tool.parameters, values, strict=True)))
        result = _result(rng)
        return Turn(
            "tool", key, prompt, Answer(call, Form.MACHINE), result, Answer(f"The tool says: {result}.", Form.VERBATIM)
        )

    return task
