"""Tools from npm, for nightly tests: installed into a folder of the test run, and nowhere else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def install(folder: Path, *packages: str) -> Path:
    """The node_modules with these packages. Skips the test where there is no npm; fails where npm does."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm here")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [npm, "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder), *packages],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return folder / "node_modules"
