"""`mlx-run logs`: what the runner, or one model's engine, wrote."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path

from runner.cli.locate import add_files, add_name, find_kept, wanted
from runner.cli.text import count
from runner.control.state_folder import StateFolder
from runner.errors import NotRunning, RunnerError


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", nargs="?", help="a model's name (default: the runner's own log)")
    add_name(parser)
    add_files(parser, short=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on printing what is added")
    parser.add_argument("-t", "--tail", type=count, default=100, metavar="N", help="start with the last N lines")
    parser.epilog = "example:\n  mlx-run logs demo-chat -f"


def run(arguments: argparse.Namespace) -> int:
    """0; 1 when there is no such log."""
    # The log of a runner that is gone is worth most, so it need not be up.
    folder = find_kept(wanted(arguments))
    path = _log(folder, arguments.model)
    with path.open(encoding="utf-8", errors="replace") as log:
        sys.stdout.writelines(deque(log, maxlen=min(arguments.tail, sys.maxsize)))
        sys.stdout.flush()
        while arguments.follow:
            line = log.readline()
            if line:
                sys.stdout.write(line)
                sys.stdout.flush()
            else:
                time.sleep(0.2)
    return 0


def _log(folder: StateFolder, model: str | None) -> Path:
    path = folder.engine_log(model) if model else folder.log
    if path.is_file():
        return path
    has = sorted(p.stem for p in folder.log.parent.glob("*.log"))
    if not has:
        raise NotRunning(f"the runner {folder.name!r} has not logged anything")
    raise RunnerError(f"there is no log of {model!r}", hint=f"Logs of {folder.name}: {', '.join(has)}.")
