"""`mlx-run explain`: what a code at the end of a message means, with an example, or the list of all codes."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from itertools import groupby

from runner.errors import RunnerError
from runner.manifest.codes import Code, registry
from runner.manifest.suggest import suggest

_WIDTH = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("code", nargs="?", metavar="CODE", help="such as E201; left out: list all codes")
    parser.epilog = "example:\n  mlx-run explain E201"


def run(arguments: argparse.Namespace) -> int:
    """Print one explanation, or the list."""
    codes = registry()
    if arguments.code is None:
        print(_listed(codes))
        return 0
    wanted = arguments.code.strip().strip("[]").upper()
    if wanted not in codes:
        hint = suggest(wanted, codes) or "`mlx-run explain` lists all codes."
        raise RunnerError(f"there is no code {arguments.code!r}", hint=hint)
    print(_explained(codes[wanted]))
    return 0


def _listed(codes: Mapping[str, Code]) -> str:
    """By kind and group, a line a code."""
    lines = []
    for (severity, group), members in groupby(codes.values(), lambda code: (code.severity, code.group)):
        lines.append(f"{severity}s: {group}")
        lines += [f"  {code.code}  {code.title}" for code in members]
    return "\n".join(lines)


def _explained(code: Code) -> str:
    parts = [f"{code.code}: {code.title}", textwrap.fill(code.explanation, _WIDTH, break_on_hyphens=False)]
    for label, example in (("Wrong", code.wrong), ("Right", code.right)):
        if example:
            parts.append(f"{label}:\n{textwrap.indent(example.rstrip(), '    ')}")
    return "\n\n".join(parts)
