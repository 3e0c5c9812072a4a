"""`mlx-run plan`: what apply would do, without doing it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from runner.cli.locate import absolute
from runner.cli.text import render_plan_json
from runner.control import client
from runner.control.state_folder import StateFolder
from runner.machine import machine_memory
from runner.manifest.load import load_manifest
from runner.options import state_dir
from runner.plan.digests import DigestCache
from runner.plan.planner import Observed, plan
from runner.plan.render import plan_json
from runner.plan.resolve import resolve


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", metavar="FILE", help="a manifest")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--detailed-exitcode", action="store_true", help="exit with 0: nothing to do, 2: changes, 1: error"
    )
    parser.epilog = "example:\n  mlx-run plan configs/dev.yaml"


def run(arguments: argparse.Namespace) -> int:
    """0, or 2 when there is something to do and `--detailed-exitcode` asks; ManifestError: it cannot be used."""
    made = _plan(absolute(arguments.manifest))
    if arguments.json:
        print(json.dumps(made, indent=2))
    else:
        print(render_plan_json(made))
    return 2 if arguments.detailed_exitcode and made["actions"] else 0


def _plan(path: Path) -> dict[str, Any]:
    """From the runner of that name if it is up, for it knows what is observed; else against nothing."""
    loaded = load_manifest(path, os.environ)
    folder = StateFolder(state_dir(), loaded.manifest.name, create=False)
    if client.is_up(folder.control_socket):
        answer = client.request(folder.control_socket, "plan", manifest=str(path))
        made: dict[str, Any] = answer["plan"]
        return made
    memory = machine_memory()
    desired = resolve(loaded, machine_memory=memory, cache=DigestCache())
    return plan_json(plan(desired, Observed(memory_bytes=memory)))
