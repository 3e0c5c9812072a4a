"""`mlx-run wait`: returns once models are ready. Imports the standard library only."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from runner.cli.locate import add_files, add_name, find, wanted
from runner.cli.text import duration
from runner.control import client
from runner.control.conditions import TYPES
from runner.control.state_folder import StateFolder
from runner.errors import NotRunning, RunnerError, UsageError

_ANSWER = 5.0
"""Seconds that a runner may be late with its last answer before it counts as stuck."""

_LOOK = 0.1
"""Seconds between two looks for a runner that is not up yet."""

_STATUSES: Final = ("true", "false", "unknown")
_SAY: Final = (
    "Say `--for ready [MODEL]`, `--for sync`, or `--for condition=TYPE[=STATUS] [MODEL]` with one of the types "
    f"{', '.join(TYPES)}."
)


class Goal(NamedTuple):
    """What is waited for. `condition` is "" for sync alone; no `models` are all of them."""

    condition: str
    status: str
    models: tuple[str, ...]
    settled: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser)
    parser.add_argument(
        "--for",
        dest="condition",
        nargs="+",
        required=True,
        metavar=("ready|sync|condition=TYPE", "MODEL"),
        help="ready: these models are, or all are and nothing is left to do; sync: what runs is what the manifest "
        "says; condition=TYPE[=true|false]: as `status -v` shows them",
    )
    parser.add_argument("-t", "--timeout", type=duration, default=60.0, metavar="60s", help="give up after so long")
    parser.epilog = (
        "0 once it is so, 1 and why it is not after the timeout.\n\n"
        "example:\n  mlx-run wait dev --for ready\n  mlx-run wait --for condition=Degraded=false chat"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 once it is so. Raises RunnerError after the timeout, NotRunning when the runner stops first."""
    goal = parse(arguments.condition)
    deadline = time.monotonic() + arguments.timeout
    folder = _runner(wanted(arguments), deadline)
    left = max(deadline - time.monotonic(), 0.0)
    why = ""
    # Only the first line and those after an event come: a runner on which nothing happens is silent until the end.
    replies = client.stream(folder.control_socket, "watch", timeout=left + _ANSWER, within=left)
    for status in replies:
        if "models" in status:
            why = unmet(status, goal)
            if not why:
                return 0
    if time.monotonic() < deadline:
        raise NotRunning(f"the runner {folder.name!r} stopped first", hint=f"Before that, {why}")
    raise RunnerError(f"not within {arguments.timeout:g} s: {why}")


def _runner(name: str | None, deadline: float) -> StateFolder:
    """The runner, once it is up: it may have been started just before. Raises NotRunning at the deadline."""
    said = False
    while True:
        try:
            return find(name)
        except NotRunning as error:
            if time.monotonic() >= deadline:
                raise
            if not said:
                print(f"{error.message} yet; waiting for it", file=sys.stderr)
                said = True
            time.sleep(_LOOK)


def parse(words: Sequence[str]) -> Goal:
    """What `--for` says. Raises UsageError."""
    what, *models = words
    kind, *status = what.removeprefix("condition=").split("=")
    if what == "ready":
        return Goal("Ready", "true", tuple(models), settled=not models)
    if what == "sync" and not models:
        return Goal("", "", (), settled=True)
    found = next((known for known in TYPES if known.lower() == kind.lower()), None)
    wanted_status = status[0].lower() if status else "true"
    if not what.startswith("condition=") or found is None or wanted_status not in _STATUSES or len(status) > 1:
        raise UsageError(f"cannot wait for {' '.join(words)!r}", hint=_SAY)
    return Goal(found, wanted_status, tuple(models), settled=False)


def unmet(status: dict[str, Any], goal: Goal) -> str:
    """Why a status is not what is waited for; empty when it is. Models are named by name or alias."""
    if status["stopping"]:
        return "the runner is stopping"
    if goal.settled and not status["settled"]:
        return status["manifest_error"] or "the manifest has not settled yet"
    if not goal.condition:
        return "" if status["in_sync"] else str(status["drift"])
    for name in goal.models or [m["name"] for m in status["models"]]:
        model = _find(status, name)
        if model is None:
            served = ", ".join(m["name"] for m in status["models"]) or "none"
            problem = f"\n{status['manifest_error']}" if status["manifest_error"] else ""
            return f"there is no model {name!r} (models: {served}){problem}"
        if model["conditions"][goal.condition]["status"] != goal.status:
            return _state(model, goal.condition)
    return ""


def _find(status: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((m for m in status["models"] if name == m["name"] or name in m["aliases"]), None)


def _state(model: dict[str, Any], kind: str) -> str:
    condition = model["conditions"][kind]
    stage = f", {model['stage']}" if model["stage"] and model["state"] == "loading" else ""
    error = condition["message"] or model["last_error"]
    said = f"\n{error}" if error else ""
    return f"{model['name']}: {kind} is {condition['status']} ({condition['reason']}{stage}){said}"
