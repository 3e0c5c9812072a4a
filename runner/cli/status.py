"""`mlx-run status`: what is up, since when, and what is wrong. Imports the standard library only."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.cli.locate import find, runners_up
from runner.cli.text import format_age, format_bytes
from runner.control import client
from runner.errors import NotRunning, RunnerError

_BEAT = 1.0
"""Seconds between two looks while nothing happens: ages and counts change without an event."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("name", nargs="?", help="a runner's name (default: all that are up)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("-w", "--watch", action="store_true", help="draw again as things change, until Ctrl-C")
    parser.epilog = "example:\n  mlx-run status"


def run(arguments: argparse.Namespace) -> int:
    """0 when all is in sync and ready, 3 when something is not, 1 when no runner is up."""
    if arguments.watch:
        return _watch(arguments)
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


def _watch(arguments: argparse.Namespace) -> int:
    """0 when the runner has stopped. Raises RunnerError when there is nothing to draw on."""
    if arguments.json or not sys.stdout.isatty():
        raise RunnerError("--watch draws on a terminal", hint="For scripts there is `mlx-run events -f --json`.")
    folder = find(arguments.name)
    shown: tuple[str, os.terminal_size] | None = None
    with _screen():
        for status in client.stream(folder.control_socket, "watch", beat=_BEAT):
            if "models" not in status:
                continue
            now = (_render(status), os.get_terminal_size(sys.stdout.fileno()))
            if now != shown:
                sys.stdout.write(frame(*now))
                sys.stdout.flush()
            shown = now
    print(f"{folder.name}: stopped.")
    return 0


def frame(text: str, size: os.terminal_size) -> str:
    """What draws `text` over what is on a terminal: long lines wrapped, what does not fit below left out."""
    # A terminal that does not know its size says 0. The last column stays free: erasing to the end would take it.
    width, rows = max((size.columns or 80) - 1, 1), size.lines or 24
    lines = [line[at : at + width] for line in text.splitlines() for at in range(0, max(len(line), 1), width)]
    return "\x1b[H" + "\x1b[K\n".join(lines[:rows]) + "\x1b[K\x1b[J"


@contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, without a cursor; what was on it before comes back at the end."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
    sys.stdout.flush()
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?7h\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


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
