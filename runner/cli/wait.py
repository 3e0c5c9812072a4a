"""`mlx-run wait`: returns once models are ready. Imports the standard library only."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from runner.cli.locate import find
from runner.cli.text import duration
from runner.control import client
from runner.errors import NotRunning, RunnerError

_ANSWER = 5.0
"""Seconds that a runner may be late with its last answer before it counts as stuck."""

_CONDITIONS = ("ready", "sync")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("name", nargs="?", help="a runner's name (default: the only one that is up)")
    parser.add_argument(
        "--for",
        dest="condition",
        nargs="+",
        required=True,
        metavar=("ready|sync", "MODEL"),
        help="ready: these models are, or all are and the manifest is in effect; sync: the manifest is in effect",
    )
    parser.add_argument("-t", "--timeout", type=duration, default=60.0, metavar="60s", help="give up after so long")
    parser.epilog = (
        "0 once it is so, 1 and why it is not after the timeout.\n\nexample:\n  mlx-run wait dev --for ready"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 once it is so. Raises RunnerError after the timeout, NotRunning when the runner stops first."""
    condition, *models = arguments.condition
    if condition not in _CONDITIONS or (condition == "sync" and models):
        raise RunnerError(
            f"cannot wait for {' '.join(arguments.condition)!r}", hint="Say `--for ready [MODEL]` or `--for sync`."
        )
    folder = find(arguments.name)
    deadline = time.monotonic() + arguments.timeout
    why = ""
    # Only the first line and those after an event come: a runner on which nothing happens is silent until the end.
    replies = client.stream(
        folder.control_socket, "watch", timeout=arguments.timeout + _ANSWER, within=arguments.timeout
    )
    for status in replies:
        if "models" in status:
            why = unmet(status, models, sync_only=condition == "sync")
            if not why:
                return 0
    if time.monotonic() < deadline:
        raise NotRunning(f"the runner {folder.name!r} stopped first", hint=f"Before that, {why}")
    raise RunnerError(f"not within {arguments.timeout:g} s: {why}")


def unmet(status: dict[str, Any], models: Sequence[str], *, sync_only: bool = False) -> str:
    """Why a status is not what is waited for; empty when it is. `models` are names or aliases, none means all."""
    if status["stopping"]:
        return "the runner is stopping"
    if not models and not status["in_sync"]:
        return status["manifest_error"] or "the manifest has not settled yet"
    if sync_only:
        return ""
    for name in models or [m["name"] for m in status["models"]]:
        model = _find(status, name)
        if model is None:
            served = ", ".join(m["name"] for m in status["models"]) or "none"
            problem = f"\n{status['manifest_error']}" if status["manifest_error"] else ""
            return f"there is no model {name!r} (models: {served}){problem}"
        if model["state"] != "ready":
            return _state(model)
    return ""


def _find(status: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((m for m in status["models"] if name == m["name"] or name in m["aliases"]), None)


def _state(model: dict[str, Any]) -> str:
    stage = f" ({model['stage']})" if model["stage"] else ""
    error = f"\n{model['last_error']}" if model["last_error"] else ""
    return f"{model['name']} is in state {model['state']}{stage}{error}"
