"""`mlx-run plan`: what apply would do, without doing it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.cli.apply import add_frozen, add_scope
from runner.cli.locate import add_manifest, manifests
from runner.cli.plan_text import render_plan
from runner.control import client
from runner.control.compile import compile_manifest
from runner.control.ledger import load_committed
from runner.control.state_folder import StateFolder
from runner.errors import RunnerError
from runner.machine import machine_memory
from runner.options import Options
from runner.plan.actions import Against, Bounds
from runner.plan.planner import Observed, plan
from runner.plan.render import plan_json
from runner.plan.scope import Scope, require_targets, within
from runner.plan.spec import Desired


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_manifest(parser)
    add_scope(parser)
    add_frozen(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON (schemas/plan.schema.json)")
    parser.add_argument("--diff", action="store_true", help="show each field that changes; never a secret")
    parser.add_argument("-o", "--out", metavar="PATH", type=Path, help="write the plan as JSON to this file too")
    parser.add_argument(
        "--detailed-exitcode", action="store_true", help="exit with 0: nothing to do, 2: changes, 1: error"
    )
    parser.epilog = (
        "Compares with what runs, or with the last generation where no runner is up. Changes nothing, and downloads\n"
        "nothing.\n\n"
        "example:\n"
        "  mlx-run plan --diff configs/dev.yaml\n"
        "  mlx-run plan --detailed-exitcode --json configs/dev.yaml > plan.json"
    )


def run(arguments: argparse.Namespace) -> int:
    """0, or 2 when there is something to do and `--detailed-exitcode` asks; ManifestError: it cannot be used."""
    made = preview(manifests(arguments), target=arguments.target, prune=arguments.prune, frozen=arguments.frozen)
    text = json.dumps(made, indent=2)
    if arguments.out is not None:
        _save(arguments.out, text)
    print(text if arguments.json else render_plan(made, diff=arguments.diff))
    return 2 if arguments.detailed_exitcode and made["actions"] else 0


def preview(
    paths: tuple[Path, ...], *, target: Sequence[str] = (), prune: bool = True, frozen: bool = False
) -> dict[str, Any]:
    """The plan for a manifest, as JSON: by the runner of its name if that is up, for it knows what is observed.

    Raises ManifestError, RunnerError for a target that is none, and what the control socket's client does.
    """
    compiled = compile_manifest((paths, None, None, frozen))
    desired = compiled.desired or compiled.provisional
    if desired is None or compiled.options is None:
        error = compiled.error()
        assert error is not None, "a manifest is either wrong or resolved"
        raise error
    folder = StateFolder(compiled.options.state_dir, compiled.name, create=False)
    if client.is_up(folder.control_socket):
        asked = {"target": list(target), "prune": prune, "frozen": frozen}
        answer = client.request(folder.control_socket, "plan", timeout=None, manifests=list(map(str, paths)), **asked)
        made: dict[str, Any] = answer["plan"]
        return made
    scope, observed = Scope(tuple(target), prune), _last_live(folder, desired, compiled.options)
    require_targets(scope, desired, observed)
    return plan_json(plan(within(scope, desired, observed), observed))


def _last_live(folder: StateFolder, desired: Desired, options: Options) -> Observed:
    """What was live when a runner was last up."""
    nothing = Observed(memory_bytes=machine_memory(), bounds=Bounds(options.drain_timeout, options.load_wait))
    found = load_committed(folder, [key for listener in desired.listeners for key in listener.api_keys])
    if found is None:
        return nothing
    generation, kept = found
    against = Against("generation", generation.number)
    return replace(nothing, models=kept.models, listeners=kept.listeners, against=against)


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunnerError(f"cannot write {path}: {error.strerror}") from None
