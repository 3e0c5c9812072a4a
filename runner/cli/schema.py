"""`mlx-run schema`: the manifest's JSON schema, for editors and CI."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runner.errors import RunnerError
from runner.manifest.schema import render_schema


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there instead of printing it")
    parser.add_argument("--overlay", action="store_true", help="of a file that goes over others: nothing is required")
    parser.epilog = (
        "An editor finds it by the manifest's first line:\n"
        "  # yaml-language-server: $schema=./manifest.schema.json\n\n"
        "example:\n  mlx-run schema --output manifest.schema.json"
    )


def run(arguments: argparse.Namespace) -> int:
    """0; raises RunnerError when the file cannot be written."""
    if arguments.output is None:
        sys.stdout.write(render_schema(overlay=arguments.overlay))
        return 0
    try:
        Path(arguments.output).write_text(render_schema(overlay=arguments.overlay), encoding="utf-8")
    except OSError as error:
        raise RunnerError(f"cannot write {arguments.output}: {error.strerror}") from None
    return 0
