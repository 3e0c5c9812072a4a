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

from runner.cli.locate import add_files, add_name, find, runners_up, wanted
from runner.cli.text import format_age, format_bytes
from runner.control import client
from runner.control.conditions import GOOD
from runner.errors import NotRunning, UsageError

_BEAT = 1.0
"""Seconds between two looks while nothing happens: ages and counts change without an event."""

_RESTING = ("idle", "loading")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every condition of every model, since when")
    parser.add_argument("-w", "--watch", action="store_true", help="draw again as things change, until Ctrl-C")
    parser.epilog = "example:\n  mlx-run status"


def run(arguments: argparse.Namespace) -> int:
    """0 when all is in sync and ready, 3 when something is not, 1 when no runner is up."""
    if arguments.watch:
        return _watch(arguments)
    name = wanted(arguments)
    folders = [find(name)] if name else runners_up()
    if not folders:
        raise NotRunning("no runner is up", hint="Start one with `mlx-run apply MANIFEST`.")
    found = [client.request(folder.control_socket, "status") for folder in folders]
    for status in found:
        status.pop("done", None)
    if arguments.json:
        json.dump(found[0] if name or len(found) == 1 else found, sys.stdout, indent=2)
        print()
    else:
        print("\n\n".join(_render(status, verbose=arguments.verbose) for status in found))
    return 0 if all(_well(status) for status in found) else 3


def _watch(arguments: argparse.Namespace) -> int:
    """0 when the runner has stopped. Raises UsageError when there is nothing to draw on."""
    if arguments.json or not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal", hint="For scripts there is `mlx-run events -f --json`.")
    folder = find(wanted(arguments))
    shown: tuple[str, os.terminal_size] | None = None
    with _screen():
        for status in client.stream(folder.control_socket, "watch", beat=_BEAT):
            if "models" not in status:
                continue
            now = (_render(status, verbose=arguments.verbose), os.get_terminal_size(sys.stdout.fileno()))
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
    return bool(status["in_sync"]) and all(map(_is_as_wanted, status["models"]))


def _is_as_wanted(model: dict[str, Any]) -> bool:
    """Ready, or not loaded because nobody asks for it."""
    return model["state"] == "ready" or (model["on_demand"] and model["state"] in _RESTING and not model["last_error"])


def _render(status: dict[str, Any], *, verbose: bool) -> str:
    now = time.time()
    age = format_age(now - status["started_at"])
    parts = (
        status["name"],
        f"up {age}",
        f"pid {status['pid']}",
        f"generation {status['generation']}",
        " + ".join(status["manifests"]),
    )
    lines = ["  ".join(parts)]
    if not status["watching"]:
        lines += ["", "  Edits wait for the next `mlx-run apply` (--no-watch)."]
    if status.get("frozen"):
        lines += ["", "  Held to its lock file (--frozen), edits too."]
    if not status["in_sync"]:
        lines += ["", *_problem_lines(status)]
    if status["warnings"]:
        lines += ["", *map(_warning_line, status["warnings"])]
    if verbose:
        lines += ["", _backstop_line(status["memory_backstop"])]
    lines += ["", "SERVERS"]
    for server in status["servers"]:
        auth = "  (API key)" if server["auth"] else ""
        lines.append(f"  {server['name']:<16} {server['address']}{auth}  serves {', '.join(server['models'])}")
    lines += ["", "MODELS"]
    for model in status["models"]:
        lines += _model_lines(model, now, verbose=verbose)
    return "\n".join(lines)


def _problem_lines(status: dict[str, Any]) -> list[str]:
    if status["drift"] and not status["manifest_error"]:
        if status["left_out"]:
            return [f"  Drift: {status['drift']}.", "  Edits go live within that; `mlx-run apply` makes it whole."]
        if status["changes"]:
            reverted = "  `mlx-run adopt` writes it into the manifest; `mlx-run apply`, or any edit, reverts it."
            return [f"  Drift: {status['drift']}.", reverted]
        return [f"  Drift: {status['drift']}.", "  Its next edit goes live, and so does `mlx-run apply`."]
    if not status["manifest_error"]:
        return ["  not settled yet"]
    kept = f"  The manifest is not in effect; generation {status['generation']} goes on."
    return [kept, *(f"  {line}" for line in status["manifest_error"].splitlines())]


def _warning_line(warning: dict[str, Any]) -> str:
    place = f"{warning['file']}:{warning['line']}:{warning['column']}" if warning["line"] else warning["file"]
    hint = f" ({warning['hint']})" if warning["hint"] else ""
    return f"  warning: {place}: {warning['path']}: {warning['message']} [{warning['code']}]{hint}"


def _backstop_line(backstop: dict[str, str]) -> str:
    if backstop["kind"] == "cgroup":
        return f"  Memory: the kernel holds each engine to a hard limit, by a control group in {backstop['path']}."
    if backstop["kind"] == "none":
        return "  Memory: engines watch themselves; this system has no hard limit for them."
    first = "engines are the first that it ends when the machine is out of memory"
    return f"  Memory: no hard limit by the kernel ({backstop['reason']}); {first}."


def _model_lines(model: dict[str, Any], now: float, *, verbose: bool) -> list[str]:
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
    commits = dict(model["commits"])
    of_model = commits.pop("model", "")
    lines.append(f"    {model['source']}" + (f"@{of_model if verbose else of_model[:12]}" if of_model else ""))
    lines += [f"    {what}: commit {commit}" for what, commit in commits.items() if verbose]
    if verbose and model["hard_limit_bytes"]:
        lines.append(f"    hard limit: {format_bytes(model['hard_limit_bytes'])}")
    if model["adapters"]:
        default = model["default_adapter"]
        names = [a["name"] + (" (default)" if a["name"] == default else "") for a in model["adapters"]]
        lines.append(f"    adapters: {', '.join(names)}")
    if model["draft"]:
        lines.append(f"    draft: {model['draft']}{_acceptance(model) if verbose else ''}")
    if model["last_error"]:
        lines += [f"    {line}" for line in model["last_error"].splitlines()]
    lines += [f"    {line}" for line in _condition_lines(model["conditions"], now, verbose=verbose)]
    return lines + [f"    {note}" for note in model["notes"]]


def _acceptance(model: dict[str, Any]) -> str:
    drafted = model["drafted_tokens"]
    if not drafted:
        return ", has proposed nothing yet"
    return f", {model['accepted_tokens'] / drafted:.0%} of {drafted:,} proposed tokens accepted"


def _condition_lines(conditions: dict[str, dict[str, Any]], now: float, *, verbose: bool) -> list[str]:
    """All of them, or those that are bad and that the model's state does not say."""
    lines = []
    for kind, held in conditions.items():
        if not verbose and (kind in ("Loaded", "Ready") or held["status"] in (GOOD[kind], "unknown")):
            continue
        message = f": {held['message'].splitlines()[0]}" if held["message"] else ""
        since = format_age(now - held["since"])
        lines.append(f"{kind:<10} {held['status']:<7} for {since}, {held['reason']}{message}")
    return lines
