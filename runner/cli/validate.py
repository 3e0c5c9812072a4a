"""`mlx-run validate`: is this manifest sound? Neither MLX nor the network is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import ManifestError
from runner.manifest.advice import advise
from runner.manifest.load import load_manifest
from runner.manifest.report import FileReport, render_diagnostics


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", nargs="+", metavar="FILE", help="a manifest")
    parser.add_argument(
        "--format",
        choices=["text", "json", "github", "sarif", "junit"],
        default="text",
        help="text for people (default); the others go to standard output, for editors and CI",
    )
    parser.add_argument("--strict", action="store_true", help="count warnings as errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="with text: print errors only")
    parser.epilog = (
        "example:\n"
        "  mlx-run validate configs/*.yaml\n"
        "  mlx-run validate --strict --format sarif configs/*.yaml > mlx-run.sarif\n\n"
        "`mlx-run explain CODE` explains the code at the end of a message."
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when every file is sound, else 1."""
    reports = []
    for name in arguments.manifest:
        report, summary = _check(name, strict=arguments.strict)
        reports.append(report)
        if arguments.format == "text":
            _print(report, summary, quiet=arguments.quiet)
    if arguments.format != "text" and (text := _render(arguments.format, reports)):
        print(text)
    return int(not all(report.ok for report in reports))


def _check(name: str, *, strict: bool) -> tuple[FileReport, str]:
    """What was found in one file, and where it can be used what is in it."""
    try:
        loaded = load_manifest(Path(name), os.environ)
    except ManifestError as error:
        return FileReport(name, tuple(error.diagnostics)), ""
    found = advise(loaded)
    if strict:
        found = [diagnostic._replace(severity="error") for diagnostic in found]
    manifest = loaded.manifest
    return FileReport(name, tuple(found)), f"{len(manifest.models)} models, {len(manifest.servers)} servers"


def _print(report: FileReport, summary: str, *, quiet: bool) -> None:
    if shown := report.errors if quiet else report.diagnostics:
        print(render_diagnostics(shown), file=sys.stderr)
    if report.ok and not quiet:
        print(f"{report.file}: ok ({summary})")


def _render(style: str, reports: Sequence[FileReport]) -> str:
    # XML, SARIF and the texts of the codes are imported only here: `validate` in text runs at every save.
    if style == "sarif":
        from runner.manifest.sarif import render_sarif  # noqa: PLC0415

        return render_sarif(reports)
    from runner.manifest import formats  # noqa: PLC0415

    renderers = {"json": formats.render_json, "github": formats.render_github, "junit": formats.render_junit}
    return renderers[style](reports)
