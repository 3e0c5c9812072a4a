"""`mlx-run plan`: what apply would do, without doing it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from runner.cli.locate import absolute
from runner.cli.text import render_plan_json
from runner.control import client
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics
from runner.options import state_dir
from runner.plan.digests import DigestCache
from runner.plan.planner import Observed, machine_memory, plan
from runner.plan.render import plan_json
from runner.plan.resolve import resolve


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", metavar="FILE", help="a manifest")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.epilog = "example:\n  mlx-run plan configs/dev.yaml"


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when the manifest cannot be used."""
    try:
        made = _plan(Path(arguments.manifest))
    except ManifestError as error:
        print(render_diagnostics(error.diagnostics), file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(made, indent=2))
    else:
        print(render_plan_json(made))
    return 0


def _plan(path: Path) -> dict[str, Any]:
    """From the runner of that name if it is up, for it knows what is observed; else against nothing."""
    loaded = load_manifest(path, os.environ)
    folder = StateFolder(state_dir(), loaded.manifest.name, create=False)
    if client.is_up(folder.control_socket):
        answer = client.request(folder.control_socket, "plan", manifest=absolute(str(path)))
        made: dict[str, Any] = answer["plan"]
        return made
    memory = machine_memory()
    desired = resolve(loaded, machine_memory=memory, cache=DigestCache())
    return plan_json(plan(desired, Observed(memory_bytes=memory)))
