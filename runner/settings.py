"""What the environment says: `MLX_RUN_*`. Everything that describes a deployment is in the manifest instead."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where state lives and how processes are started. Frozen: read once at the start of a command."""

    model_config = SettingsConfigDict(env_prefix="MLX_RUN_", frozen=True)

    state_dir: Path = Field(
        default_factory=lambda: platformdirs.user_state_path("mlx-run", appauthor=False),
        description="Sockets, logs and generations, one folder a runner.",
    )
    engine_command: str = Field(
        default="",
        description="Command line that replaces `python -m runner.engine`; the control plane's own tests use it.",
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    drain_timeout: float = Field(default=30.0, ge=0, description="Seconds that running requests get when something stops.")
    orphan_grace: float = Field(default=5.0, ge=0, description="Seconds an engine waits without its runner.")
