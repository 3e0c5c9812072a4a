"""`mlx-run rollback`: make an earlier generation live again."""

from __future__ import annotations

import argparse
import time

from runner.cli.locate import add_files, add_name, find, wanted
from runner.cli.plan_text import render_plan
from runner.cli.text import generation
from runner.cli.view import View
from runner.control import client
from runner.control.who import this_user


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "number", nargs="?", type=generation, metavar="N", help="which generation (default: the one before the current)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--wait", action="store_true", help="return once what was replaced has drained and is gone")
    parser.add_argument(
        "--generation", type=generation, metavar="G", help="refuse when another generation than G is current by now"
    )
    add_name(parser)
    add_files(parser)
    parser.epilog = (
        "It takes the same way as apply, and becomes a generation of its own. The manifest is not touched: while it\n"
        "stays as it is, also over a restart, it does not undo the rollback. Its next edit goes live, and so does\n"
        "`mlx-run apply`. Keys, models and adapters must be as they were; else nothing changes, and it says why.\n\n"
        "example:\n  mlx-run rollback\n  mlx-run rollback 3 --dry-run"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 once it is live. Raises ControlError with what is in the way; then nothing has changed."""
    began = time.monotonic()
    folder = find(wanted(arguments))
    fields = {"to": arguments.number, "generation": arguments.generation, "user": this_user()}
    if arguments.dry_run:
        answer = client.request(folder.control_socket, "rollback", dry_run=True, timeout=None, **fields)
        print(f"Back to generation {answer['restores']} from {answer['generation']}:")
        print(render_plan(answer["plan"]))
        return 0
    with View((), began) as view:
        for reply in client.stream(folder.control_socket, "rollback", wait=arguments.wait, **fields):
            view.show(reply)
    return 0
