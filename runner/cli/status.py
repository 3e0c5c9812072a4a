"""`mlx-run status`: what is up, since when, and what is wrong. Imports the standard library only."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from runner.cli.locate import find, runners_up
from runner.cli.text import format_age, format_bytes
from runner.control import client
from runner.errors import NotRunning


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("name", nargs="?", help="a runner's name (default: all that are up)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.epilog = "example:\n  mlx-run status"


def run(arguments: argparse.Namespace) -> int:
    """0 when all is in sync and ready, 3 when something is not, 1 when no runner is up."""
    folders = [find(arguments.name)] if arguments.name else runners_up()
    if not folders:
        raise NotRunning("no runner is up", hint="Start one with `mlx-run apply MANIFEST`.")
    found = [client.request(folder.control_socket, "status") for folder in folders]
    for status in found:
        status.pop("done", None)
    if arguments.json:
        json.dump(found[0] if arguments.name or len(found) == 1 else found, sys.stdout, indent=2)
        print()
    else:
        print("\n\n".join(_render(status) for status in found))
    return 0 if all(_well(status) for status in found) else 3


def _well(status: dict[str, Any]) -> bool:
    return bool(status["in_sync"]) and all(m["state"] == "ready" for m in status["models"])


def _render(status: dict[str, Any]) -> str:
    now = time.time()
    age = format_age(now - status["started_at"])
    parts = (
        status["name"],
        f"up {age}",
        f"pid {status['pid']}",
        f"generation {status['generation']}",
        status["manifest"],
    )
    lines = ["  ".join(parts)]
    if not status["in_sync"]:
        lines += ["", *_problem_lines(status)]
    lines += ["", "SERVERS"]
    for server in status["servers"]:
        auth = "  (API key)" if server["auth"] else ""
        lines.append(f"  {server['name']:<16} {server['address']}{auth}  serves {', '.join(server['models'])}")
    lines += ["", "MODELS"]
    for model in status["models"]:
        lines += _model_lines(model, now)
    return "\n".join(lines)


def _problem_lines(status: dict[str, Any]) -> list[str]:
    if not status["manifest_error"]:
        return ["  not settled yet"]
    kept = f"  The manifest is not in effect; generation {status['generation']} goes on."
    return [kept, *(f"  {line}" for line in status["manifest_error"].splitlines())]


def _model_lines(model: dict[str, Any], now: float) -> list[str]:
    state = model["state"]
    if state == "loading" and model["stage"]:
        state = f"loading ({model['stage']})"
    parts = [f"  {model['name']:<16} {state:<10}"]
    if model["loaded_at"]:
        parts.append(f"for {format_age(now - model['loaded_at'])}")
    if model["active_bytes"]:
        parts.append(format_bytes(model["active_bytes"]))
    parts.append(f"{model['in_flight']} running, {model['waiting']} waiting")
    if model["restarts"]:
        parts.append(f"{model['restarts']} restarts")
    lines = ["  ".join(parts)]
    lines.append(f"    {model['source']}")
    if model["adapters"]:
        default = model["default_adapter"]
        names = [a["name"] + (" (default)" if a["name"] == default else "") for a in model["adapters"]]
        lines.append(f"    adapters: {', '.join(names)}")
    if model["last_error"]:
        lines += [f"    {line}" for line in model["last_error"].splitlines()]
    return lines + [f"    {note}" for note in model["notes"]]
