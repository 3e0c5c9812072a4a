"""`mlx-run validate`: is this manifest sound? Neither MLX nor the network is needed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("manifest", nargs="+", metavar="FILE", help="a manifest")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing when all is well")
    parser.epilog = "example:\n  mlx-run validate configs/*.yaml"


def run(arguments: argparse.Namespace) -> int:
    """0 when every file is sound, else 1."""
    failed = False
    for name in arguments.manifest:
        try:
            loaded = load_manifest(Path(name), os.environ)
        except ManifestError as error:
            failed = True
            print(render_diagnostics(error.diagnostics), file=sys.stderr)
        else:
            if not arguments.quiet:
                manifest = loaded.manifest
                print(f"{name}: ok ({len(manifest.models)} models, {len(manifest.servers)} servers)")
    return int(failed)
