"""One exchange of a conversation, and how its question is put."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .styles import Answer
from .words import held_out

_OPENINGS = (
    "Please tell me: ",
    "Hey, ",
    "Hello, ",
    "Hi! ",
    "Quick question: ",
    "One more thing: ",
    "Now: ",
    "OK. ",
    "Next: ",
)
_CLOSINGS = (" Thanks!", " Thank you.", " Please.")


@dataclass(frozen=True)
class Turn:
    kind: str
    key: str | None  # what decides whether this turn is held out; None: never
    prompt: str
    answer: Answer
    result: str | None = None  # what the tool gave back, when the answer is a tool call
    closing: Answer | None = None  # what the assistant says about that result


Task = Callable[[random.Random], Turn]


def ask(rng: random.Random, question: str) -> str:
    """People open, close and write the same question in many ways."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip(".?")
    opening = rng.choice(_OPENINGS) if rng.random() < 0.25 else ""
    closing = rng.choice(_CLOSINGS) if rng.random() < 0.15 and question[-1] in ".?" else ""
    return opening + question + closing


def draw(task: Task, rng: random.Random, held: bool) -> Turn:
    """A turn from the wanted side of the split."""
    while True:
        turn = task(rng)
        if (turn.key is not None and held_out(turn.key.lower())) is held:
            return turn
