"""Names with a meaning of their own. Nothing is imported here: the runner shares them without pydantic."""

from __future__ import annotations

from typing import Final

PLAIN_MODEL: Final = frozenset({"base", "none"})
"""Adapter names that ask for the model without its default adapter; no adapter may have one."""

PATTERNS_KEY: Final = "from"
"""Among a model's adapters: not an adapter, but the patterns of folders that are."""

NAME_PATTERN: Final = r"[a-z0-9][a-z0-9._-]{0,62}"
"""A name of a runner, a server, a model or an adapter."""
