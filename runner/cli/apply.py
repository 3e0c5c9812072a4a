"""`mlx-run apply`: start the runner a manifest describes, or hand the manifest to the one that is up."""

from __future__ import annotations

import argparse
import time

from runner.control.compiler import Compiler


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", metavar="FILE", help="a manifest")
    parser.add_argument("-d", "--detach", action="store_true", help="return once everything is ready")
    parser.epilog = (
        "Without a runner of the manifest's name this process becomes it, follows the file, and drains on Ctrl-C\n"
        "(twice: stops at once). With one, the manifest is handed over to it.\n\n"
        "example:\n  mlx-run apply configs/dev.yaml"
    )


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when the manifest could not be applied."""
    began = time.monotonic()
    compiler = Compiler()
    compiler.start()
    try:
        # Imported here, while the process that reads the manifest starts: the two take turns at nothing.
        from runner.cli.applying import apply  # noqa: PLC0415
        from runner.cli.locate import absolute  # noqa: PLC0415

        return apply(absolute(arguments.manifest), compiler, began, detach=arguments.detach)
    finally:
        compiler.stop()
