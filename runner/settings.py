"""What the environment says: `MLX_RUN_*`. Everything that describes a deployment is in the manifest instead."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from runner.options import DRAIN_TIMEOUT, LOAD_WAIT, Options, cache_dir, state_dir


class Settings(BaseSettings):
    """Where state lives and how processes are started. Frozen: read once at the start of a command."""

    model_config = SettingsConfigDict(env_prefix="MLX_RUN_", frozen=True)

    state_dir: Path = Field(default_factory=state_dir, description="Sockets, logs, generations: one folder a runner.")
    engine_command: str = Field(
        default="", description="Command line in place of `python -m runner.engine`; the control plane's tests use it."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="For the runner's log.")
    drain_timeout: float = Field(default=DRAIN_TIMEOUT, ge=0, description="Seconds that running requests get.")
    orphan_grace: float = Field(default=5.0, ge=0, description="Seconds an engine waits without its runner.")
    load_wait: float = Field(default=LOAD_WAIT, ge=0, description="Seconds a request waits for its model.")
    cache_dir: Path = Field(default_factory=cache_dir, description="Quantised copies of models.")
    cgroups: bool = Field(
        default=True, description="On Linux, have the kernel hold each engine to its memory where control groups can."
    )

    def options(self) -> Options:
        """The same values without pydantic."""
        folders = {"state_dir": self.state_dir.absolute(), "cache_dir": self.cache_dir.absolute()}
        return Options(**{**self.model_dump(), **folders})
