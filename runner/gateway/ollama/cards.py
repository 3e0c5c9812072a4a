"""Models as Ollama lists them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from runner.gateway.backend import ModelCard


def tag(card: ModelCard) -> dict[str, Any]:
    """A line of `/api/tags`."""
    return {
        "name": card.id,
        "model": card.id,
        "modified_at": datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": card.size,
        "digest": card.digest,
        "details": details(card),
    }


def details(card: ModelCard) -> dict[str, Any]:
    """What kind of model it is. An adapter's parent is its base."""
    family = card.architecture or "mlx"
    return {
        "parent_model": card.model if card.adapter else "",
        "format": "mlx",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def show(card: ModelCard) -> dict[str, Any]:
    """`/api/show`."""
    family = card.architecture or "mlx"
    return {
        "modelfile": f"FROM {card.source}\n" + (f"ADAPTER {card.adapter}\n" if card.adapter else ""),
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": tag(card)["modified_at"],
        "details": details(card),
        "model_info": {"general.architecture": family, f"{family}.context_length": card.max_context},
        "capabilities": ["completion", "tools"],
    }
