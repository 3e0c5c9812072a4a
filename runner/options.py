"""What `runner.settings` comes down to, as plain data: the runner and `mlx-run status` do not import pydantic."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PREFIX = "MLX_RUN_"
STATE_DIR_VARIABLE = f"{PREFIX}STATE_DIR"


def configured(variables: Iterable[str]) -> bool:
    """Whether the environment says more than where state is kept, so that it takes `runner.settings` to read it."""
    return any(name.upper().startswith(PREFIX) and name != STATE_DIR_VARIABLE for name in variables)


def state_dir() -> Path:
    """`MLX_RUN_STATE_DIR`, or the platform's folder for user state."""
    configured = os.environ.get(STATE_DIR_VARIABLE)
    if configured:
        return Path(configured).absolute()
    # Imported here: a fifth of the time that `mlx-run status` takes, and not needed where the variable is set.
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_state_path("mlx-run", appauthor=False)


@dataclass(frozen=True, slots=True)
class Options:
    """The fields of `runner.settings.Settings`, which describes them. Times are seconds."""

    state_dir: Path
    engine_command: str = ""
    log_level: str = "info"
    drain_timeout: float = 30.0
    orphan_grace: float = 5.0
    load_wait: float = 30.0
