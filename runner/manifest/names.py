"""Names with a meaning of their own, and names in paths. The runner shares them without pydantic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PLAIN_MODEL: Final = frozenset({"base", "none"})
"""Adapter names that ask for the model without its default adapter; no adapter may have one."""

PATTERNS_KEY: Final = "from"
"""Among a model's adapters: not an adapter, but the patterns of folders that are."""

NAME_PATTERN: Final = r"[a-z0-9][a-z0-9._-]{0,62}"
"""A name of a runner, a server, a model or an adapter."""


def model_of(path: str, names: Iterable[str]) -> str | None:
    """Which of these models a dotted path of the manifest is of, such as `models.chat.source`; None of none.

    A name may have dots: `models.qwen2.5.source` is of `qwen2.5`, and of `qwen2` where there is no such model.
    """
    within = (name for name in names if f"{path}.".startswith((f"models.{name}.", f"models.{name}[")))
    return max(within, key=len, default=None)
