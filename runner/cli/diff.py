"""`mlx-run diff`: what differs between two generations, field by field."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from runner.cli.history import warn
from runner.cli.locate import add_files, add_name, find_kept, wanted
from runner.cli.plan_text import render_change
from runner.cli.text import generation
from runner.control.generations import Generations
from runner.control.ledger import kept_spec, unknown
from runner.errors import RunnerError
from runner.plan.changes import Change, Spec, changes
from runner.plan.render import change_json
from runner.plan.spec import Desired

MIXED: Final = True
"""Words and options in any order."""

_SIGNS: Final = {"added": "+", "changed": "~", "removed": "-"}

Difference = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("before", type=generation, metavar="N", help="a generation, as `mlx-run history` numbers them")
    parser.add_argument("after", type=generation, nargs="?", metavar="M", help="another one (default: the current)")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    add_name(parser)
    add_files(parser)
    parser.epilog = (
        "Works whether the runner is up or not. Of a secret it says only that it changed.\n\n"
        "example:\n  mlx-run diff 3\n  mlx-run diff 3 5"
    )


def run(arguments: argparse.Namespace) -> int:
    """0. Raises RunnerError where a generation is not there or cannot be read."""
    generations = Generations(find_kept(wanted(arguments)).generations, warn)
    current = generations.current()
    after = arguments.after if arguments.after is not None else current.number if current else 0
    old, new = (_read(generations, number) for number in (arguments.before, after))
    found = differences(old, new)
    if arguments.json:
        print(json.dumps({"from": arguments.before, "to": after, "differences": found}, indent=2))
    elif not found:
        print(f"Nothing differs between the generations {arguments.before} and {after}.")
    else:
        print(f"{new.name}: generation {arguments.before} → {after}")
        for difference in found:
            print(f"  {_SIGNS[difference['change']]} {difference['target']}")
            for change in difference["changes"]:
                print(f"      {render_change(change)}")
    return 0


def _read(generations: Generations, number: int) -> Desired:
    if generations.find(number) is None:
        raise unknown(number, generations.all())
    found = kept_spec(generations, number)
    if found is None:
        raise RunnerError(f"generation {number} was written by another version, or is damaged")
    return found


def differences(old: Desired, new: Desired) -> list[Difference]:
    """What differs, by target, as `{target, change, changes}`; `changes` are as in a plan's JSON."""
    found = [
        *_between("servers", {s.name: s for s in old.listeners}, {s.name: s for s in new.listeners}),
        *_between("models", {m.name: m for m in old.models}, {m.name: m for m in new.models}),
    ]
    before, after = old.memory_limit_bytes or None, new.memory_limit_bytes or None
    if before != after:
        limit = Change("limit", _how(before, after), before, after, unit="bytes")
        found.append({"target": "memory", "change": "changed", "changes": [change_json(limit)]})
    return found


def _between(section: str, had: Mapping[str, Spec], has: Mapping[str, Spec]) -> list[Difference]:
    found = []
    for name in dict.fromkeys((*has, *had)):
        old, new = had.get(name), has.get(name)
        if old != new:
            fields = [change_json(change) for change in changes(old, new)]
            found.append({"target": f"{section}.{name}", "change": _how(old, new), "changes": fields})
    return found


def _how(old: object, new: object) -> Literal["added", "changed", "removed"]:
    return "added" if old is None else "removed" if new is None else "changed"
