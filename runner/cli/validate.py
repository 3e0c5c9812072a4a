"""`mlx-run validate`: is this manifest sound? Neither MLX nor the network is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.cli.locate import add_files
from runner.cli.machine import machine_of
from runner.control import client
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError, MlxRunError, UsageError
from runner.inspect.files import DigestCache
from runner.machine import Machine, this_machine
from runner.manifest.advice import advise
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.report import FileReport, render_diagnostics
from runner.options import state_dir
from runner.plan.examine import diagnose
from runner.plan.memory import memory_budget
from runner.plan.ports import check_ports
from runner.plan.resolve import Look, look

_NOTES: Final = 3
"""The most sources that are named which could not be checked; the forms for programs name all."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", nargs="*", metavar="FILE", help="a manifest; several are checked one by one")
    add_files(parser, about="merge these, left to right, and check the result")
    parser.add_argument(
        "--format",
        choices=["text", "json", "github", "sarif", "junit"],
        default="text",
        help="text for people (default); the others go to standard output, for editors and CI",
    )
    parser.add_argument("--strict", action="store_true", help="count warnings as errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="with text: print errors only")
    parser.add_argument("--memory", action="store_true", help="print what each model takes, with text and json")
    parser.add_argument(
        "--for",
        dest="machine",
        type=machine_of,
        metavar="memory=SIZE[,device=gpu|cpu]",
        help="check for another machine; without a GPU, MLX computes in float32 (default: gpu)",
    )
    parser.add_argument(
        "--no-files", action="store_true", help="check the text alone; do not look at folders of models, or at ports"
    )
    parser.epilog = (
        "example:\n"
        "  mlx-run validate configs/*.yaml\n"
        "  mlx-run validate -f base.yaml -f prod.yaml\n"
        "  mlx-run validate --for memory=16GiB --memory configs/dev.yaml\n"
        "  mlx-run validate --strict --format sarif configs/*.yaml > mlx-run.sarif\n\n"
        "`mlx-run explain CODE` explains the code at the end of a message."
    )


@dataclass(frozen=True, slots=True)
class _Checked:
    """One manifest: what was found, and what there is to say of it where it is sound."""

    report: FileReport
    summary: str = ""
    table: str = ""


def run(arguments: argparse.Namespace) -> int:
    """0 when every file is sound, else 1. Raises UsageError where there is none."""
    if not arguments.manifest and not arguments.files:
        raise UsageError("no manifest is given", hint="Write its path, such as configs/dev.yaml.")
    reports = []
    cache = DigestCache()
    for names in [*([name] for name in arguments.manifest), *([arguments.files] if arguments.files else [])]:
        checked = _check(names, arguments, cache)
        reports.append(checked.report)
        if arguments.format == "text":
            _print(checked, quiet=arguments.quiet)
    if arguments.format != "text" and (text := _render(arguments.format, reports)):
        print(text)
    return int(not all(report.ok for report in reports))


def _check(names: Sequence[str], arguments: argparse.Namespace, cache: DigestCache) -> _Checked:
    """One manifest, of one file or several."""
    report = FileReport(names[0], (), tuple(names[1:]))
    try:
        loaded = load_manifest([Path(name) for name in names], os.environ)
    except ManifestError as error:
        return _Checked(report._replace(diagnostics=tuple(error.diagnostics)))
    found = advise(loaded)
    summary = [f"{_counted(loaded.manifest.models, 'model')}, {_counted(loaded.manifest.servers, 'server')}"]
    table = ""
    if not arguments.no_files:
        machine = arguments.machine or this_machine()
        seen = look(loaded, machine, cache)
        found += [*seen.wrong, *seen.desired.warnings, *loaded.warnings]
        if arguments.machine is None:
            found += [diagnose(loaded, problem) for problem in check_ports(loaded, _own_ports(loaded))]
        notes = tuple(_not_checked(seen))
        summary += notes if len(notes) <= _NOTES else (f"{notes[0]}; {len(notes) - 1} more were not checked either",)
        report = report._replace(notes=notes)
        if arguments.memory:
            table, report = _with_memory(loaded, machine, seen, report)
    found.sort(key=lambda d: (d.file, d.line, d.column))
    if arguments.strict:
        found = [diagnostic._replace(severity="error") for diagnostic in found]
    return _Checked(report._replace(diagnostics=tuple(dict.fromkeys(found))), "; ".join(summary), table)


def _with_memory(loaded: Loaded, machine: Machine, seen: Look, report: FileReport) -> tuple[str, FileReport]:
    from runner.cli.memory_table import memory_json, memory_table  # noqa: PLC0415 - for those who ask only

    budget = memory_budget(loaded.manifest.memory, machine)
    models = seen.desired.models
    return memory_table(models, budget), report._replace(memory=memory_json(models, budget))


def _counted(things: Sized, what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _not_checked(seen: Look) -> Iterator[str]:
    """Sources that are not here to be looked at."""
    for download in seen.desired.downloads:
        yield f"{download.repo} is not in the hub's cache, and was not checked"


def _own_ports(loaded: Loaded) -> set[int]:
    """Those of the runner that this manifest belongs to."""
    folder = StateFolder(state_dir(), loaded.manifest.name, create=False)
    try:
        status = client.request(folder.control_socket, "status", timeout=2.0)
    except (MlxRunError, OSError, ValueError):
        return set()
    addresses = (str(server.get("address", "")) for server in status.get("servers", ()))
    return {int(port) for _, _, port in (address.rpartition(":") for address in addresses) if port.isdecimal()}


def _print(checked: _Checked, *, quiet: bool) -> None:
    report = checked.report
    if shown := report.errors if quiet else report.diagnostics:
        print(render_diagnostics(shown), file=sys.stderr)
    if report.ok and not quiet:
        print(f"{report.title}: ok ({checked.summary})")
    if checked.table:
        print(checked.table)


def _render(style: str, reports: Sequence[FileReport]) -> str:
    # XML, SARIF and the texts of the codes are imported only here: `validate` in text runs at every save.
    if style == "sarif":
        from runner.manifest.sarif import render_sarif  # noqa: PLC0415

        return render_sarif(reports)
    from runner.manifest import formats  # noqa: PLC0415

    renderers = {"json": formats.render_json, "github": formats.render_github, "junit": formats.render_junit}
    return renderers[style](reports)
