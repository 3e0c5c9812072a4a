"""Names with a meaning of their own. Nothing is imported here: the runner shares them without pydantic."""

from __future__ import annotations

from typing import Final

PLAIN_MODEL: Final = frozenset({"base", "none"})
"""Adapter names that ask for the model without its default adapter; no adapter may have one."""
