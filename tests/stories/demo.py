"""What the demo models are expected to answer, from the prompts that were held out of their training."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tests.stories.harness import MODELS

LONG = "Count from 1 to 60."
"""A question whose answer takes some 200 tokens, so that something can happen while it streams."""


@cache
def held_out() -> list[dict[str, Any]]:
    """Rows of `kind`, `messages`, and the answer in each style."""
    lines = (MODELS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def long_answer(style: str) -> str:
    """The answer to LONG in `base`, `pirate` or `shout` style."""
    (row,) = (r for r in held_out() if r["messages"][-1]["content"] == LONG and len(r["messages"]) == 1)
    answer: str = row[style]
    return answer
