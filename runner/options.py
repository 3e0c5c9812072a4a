"""What `runner.settings` comes down to, as plain data: the runner and `mlx-run status` do not import pydantic."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

PREFIX = "MLX_RUN_"
STATE_DIR_VARIABLE = f"{PREFIX}STATE_DIR"
CACHE_DIR_VARIABLE = f"{PREFIX}CACHE_DIR"

DRAIN_TIMEOUT: Final = 30.0
LOAD_WAIT: Final = 30.0


def configured(variables: Iterable[str]) -> bool:
    """Whether the environment says more than where state is kept, so that it takes `runner.settings` to read it."""
    return any(name.upper().startswith(PREFIX) and name != STATE_DIR_VARIABLE for name in variables)


def state_dir() -> Path:
    """`MLX_RUN_STATE_DIR`, or the platform's folder for user state."""
    configured = os.environ.get(STATE_DIR_VARIABLE)
    if configured:
        return Path(configured).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-run"
    # As platformdirs has it (a test compares), which takes a fifth of the time of `mlx-run status` to import.
    base = os.environ.get("XDG_STATE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".local" / "state") / "mlx-run"


def cache_dir() -> Path:
    """`MLX_RUN_CACHE_DIR`, or the platform's folder for what can be made again."""
    configured = os.environ.get(CACHE_DIR_VARIABLE)
    if configured:
        return Path(configured).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-run"
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "mlx-run"


class Options(NamedTuple):
    """The fields of `runner.settings.Settings`, which describes them. Times are seconds.

    No dataclass: importing those is a quarter of what `mlx-run status` takes.
    """

    state_dir: Path
    engine_command: str = ""
    log_level: str = "info"
    drain_timeout: float = DRAIN_TIMEOUT
    orphan_grace: float = 5.0
    load_wait: float = LOAD_WAIT
    cache_dir: Path | None = None
    cgroups: bool = True

    @property
    def converted(self) -> Path:
        """Where quantised copies of models are kept."""
        return (self.cache_dir or cache_dir()) / "converted"
