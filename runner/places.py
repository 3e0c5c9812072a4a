"""Where mlx-run keeps its state. Apart from Settings, because `mlx-run status` should not wait for pydantic."""

from __future__ import annotations

import os
from pathlib import Path

STATE_DIR_VARIABLE = "MLX_RUN_STATE_DIR"


def state_dir() -> Path:
    """`MLX_RUN_STATE_DIR`, or the platform's folder for user state."""
    configured = os.environ.get(STATE_DIR_VARIABLE)
    if configured:
        return Path(configured)
    # Imported here: a fifth of the time that `mlx-run status` takes, and not needed where the variable is set.
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_state_path("mlx-run", appauthor=False)
