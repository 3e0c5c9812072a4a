"""`mlx-run down`: drain a runner and wait until it is gone."""

from __future__ import annotations

import argparse
import time

from runner.cli.locate import add_files, add_name, find, wanted
from runner.cli.text import duration
from runner.control import client
from runner.errors import RunnerError


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser)
    parser.add_argument(
        "-t", "--timeout", type=duration, metavar="30s", help="how long running requests may go on (default: 30s)"
    )
    parser.epilog = "example:\n  mlx-run down dev"


def run(arguments: argparse.Namespace) -> int:
    """0 once it is gone."""
    folder = find(wanted(arguments))
    fields = {} if arguments.timeout is None else {"drain": arguments.timeout}
    answer = client.request(folder.control_socket, "down", **fields)
    deadline = time.monotonic() + float(answer["drain_seconds"]) + 15.0
    while client.is_up(folder.control_socket):
        if time.monotonic() > deadline:
            raise RunnerError(
                f"{folder.name} (pid {answer['pid']}) is still stopping", hint="Run `mlx-run down` again."
            )
        time.sleep(0.05)
    print(f"{folder.name}: stopped.")
    return 0
