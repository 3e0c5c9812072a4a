"""`mlx-run history`: what was applied, when, by whom, and what came of it. Imports the standard library only."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from runner.cli.locate import add_files, add_name, find_kept, wanted
from runner.cli.text import table
from runner.control.generations import Generation, Generations

_SIGNS: Final = {"start": "+", "open": "+", "stop": "-", "close": "-"}
_TARGETS: Final = 6
_DIGEST_DIGITS: Final = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, oldest first")
    parser.epilog = (
        "The last 100 generations are kept, without the value of any secret, and shown whether the runner is up\n"
        "or not. `mlx-run diff N` shows what changed since, `mlx-run rollback N` goes back to one.\n\n"
        "example:\n  mlx-run history"
    )


def run(arguments: argparse.Namespace) -> int:
    """0. Raises NotRunning and RunnerError when it is not clear whose history is meant."""
    generations = Generations(find_kept(wanted(arguments)).generations, warn)
    found, current = generations.all(), generations.current()
    rows = [(header, result(header, current, found)) for header in found]
    if arguments.json:
        json.dump([_as_json(header, outcome) for header, outcome in rows], sys.stdout, indent=2)
        print()
    elif not rows:
        print("Nothing was applied yet.")
    else:
        head = ("", "WHEN", "BY", "DIGEST", "CHANGES", "RESULT")
        print(table([head, *(_row(header, outcome) for header, outcome in reversed(rows))]))
    return 0


def warn(path: Path, reason: str) -> None:
    """Say that a file is no generation; the others are shown."""
    print(f"warning: {path} is passed over: {reason}", file=sys.stderr)


def result(header: Generation, current: Generation | None, found: Sequence[Generation]) -> str:
    """What became of a generation: current, superseded, rolled back, or failed."""
    if not header.ok:
        return "failed"
    if current is not None and header.number == current.number:
        return "current"
    after = next((other for other in found if other.ok and other.number > header.number), None)
    return "rolled back" if after is not None and after.restores else "superseded"


def _row(header: Generation, outcome: str) -> tuple[str, ...]:
    via = f"rollback to {header.restores}" if header.restores else header.via
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.time))
    if header.error:
        tries = f" ({header.attempts} times)" if header.attempts > 1 else ""
        outcome = f"failed{tries}: {header.error.splitlines()[0]}"
    return str(header.number), when, f"{header.user}, {via}", header.digest[:_DIGEST_DIGITS], _changes(header), outcome


def _changes(header: Generation) -> str:
    shown = [f"{_SIGNS.get(verb, '~')}{target}" for verb, target in header.actions[:_TARGETS]]
    more = header.action_count - len(shown)
    return ", ".join(shown + ([f"{more} more"] if more > 0 else [])) or "nothing to do"


def _as_json(header: Generation, outcome: str) -> dict[str, Any]:
    return {
        "generation": header.number,
        "result": outcome,
        **{name: value for name, value in header._asdict().items() if name not in ("number", "seen")},
    }
