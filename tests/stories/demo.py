"""What the demo models are expected to answer, from the prompts that were held out of their training."""

from __future__ import annotations

import json
from typing import Any

from tests.stories.harness import MODELS

HELD_OUT: list[dict[str, Any]] = [
    json.loads(line) for line in (MODELS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
]
"""Rows of `kind`, `messages`, and the answer in each style."""

_LONGEST = max((r for r in HELD_OUT if r["kind"] == "count" and len(r["messages"]) == 1), key=lambda r: len(r["base"]))

LONG: str = _LONGEST["messages"][0]["content"]
"""A question whose answer takes some 200 tokens, so that something can happen while it streams."""


def long_answer(style: str) -> str:
    """The answer to LONG in `base`, `pirate` or `shout` style."""
    answer: str = _LONGEST[style]
    return answer
