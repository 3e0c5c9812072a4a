"""`mlx-run apply`: start the runner a manifest describes, or hand the manifest to the one that is up."""

from __future__ import annotations

import argparse
import time

from runner.cli.locate import add_manifest, manifests
from runner.cli.text import duration, generation
from runner.control.compiler import Compiler


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_manifest(parser)
    parser.add_argument(
        "-d", "--detach", action="store_true", help="leave a runner behind, and return once all is ready"
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="as -d; with --no-wait return once the plan is made, and do not see it through",
    )
    parser.add_argument("--timeout", type=duration, metavar="5m", help="undo it when it is not done after so long")
    parser.add_argument("--dry-run", action="store_true", help="show the plan; change nothing and download nothing")
    add_scope(parser)
    add_frozen(parser)
    parser.add_argument("--json", action="store_true", help="print events as lines of JSON, a result line at the end")
    parser.add_argument("--no-watch", dest="watch", action="store_false", help="take later edits by `apply` only")
    parser.add_argument(
        "--generation", type=generation, metavar="G", help="refuse when another generation than G is current by now"
    )
    parser.epilog = (
        "Without a runner of the manifest's name this process becomes it, follows the file, and drains on Ctrl-C\n"
        "(twice: stops at once). With one, the manifest is handed over to it; Ctrl-C then undoes what it has begun.\n"
        "All or nothing: whatever goes wrong, what ran before goes on. Exit codes: 0 live, 1 not, 130 given up.\n\n"
        "After --target or --prune=false what is live is not what the manifest says: status and plan show it, later\n"
        "edits stay within the same part, and an apply without them makes it whole.\n\n"
        "example:\n  mlx-run apply configs/dev.yaml\n"
        "  mlx-run apply -f base.yaml -f prod.yaml\n"
        "  mlx-run apply --wait --timeout 5m --json -f prod.yaml"
    )


def add_frozen(parser: argparse.ArgumentParser) -> None:
    """Whether the lock has to hold."""
    parser.add_argument(
        "--frozen", action="store_true", help="refuse what NAME.lock.yaml does not have, or has otherwise (`lock`)"
    )


def add_scope(parser: argparse.ArgumentParser) -> None:
    """Which part of the manifest it is about."""
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="MODEL",
        help="only this model and what it needs (repeatable; a server as servers.NAME)",
    )
    parser.add_argument(
        "--prune",
        type=_boolean,
        default=True,
        metavar="true|false",
        help="false: what runs and is not in the manifest any more stays",
    )


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when the manifest could not be applied."""
    began = time.monotonic()
    paths = manifests(arguments)
    if arguments.dry_run:
        return _dry_run(arguments)
    compiler = Compiler()
    compiler.start()
    try:
        # Imported here, while the process that reads the manifest starts: the two take turns at nothing.
        from runner.cli.applying import Wish, apply  # noqa: PLC0415

        wish = Wish(
            paths=paths,
            detach=arguments.detach or arguments.wait is not None,
            wait=arguments.wait is not False,
            timeout=arguments.timeout,
            target=tuple(arguments.target),
            prune=arguments.prune,
            json=arguments.json,
            watch=arguments.watch,
            frozen=arguments.frozen,
            generation=arguments.generation,
        )
        return apply(wish, compiler, began)
    finally:
        compiler.stop()


def _dry_run(arguments: argparse.Namespace) -> int:
    # Imported here: reading a manifest in this process takes pydantic, which an apply never imports.
    from runner.cli.plan import preview  # noqa: PLC0415
    from runner.cli.plan_text import render_plan  # noqa: PLC0415
    from runner.cli.result import print_result  # noqa: PLC0415

    made = preview(manifests(arguments), target=arguments.target, prune=arguments.prune, frozen=arguments.frozen)
    if arguments.json:
        print_result(plan=made, changed=False)
    else:
        print(render_plan(made))
        print("Dry run: nothing was changed, and nothing was downloaded.")
    return 0
