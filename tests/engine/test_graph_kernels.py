"""What MLX has to compile for graphs that are kept, which on a GPU takes seconds a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine.conftest import ModelFolder


def test_graphs_of_other_widths_and_thresholds_need_no_kernels_of_their_own(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    """A number in a graph is part of a kernel, and on a GPU requests would wait for seconds until that is compiled."""
    found = []
    for name, numbers in (("few", ("60", "1", "2")), ("more", ("90", "1", "2", "3", "5"))):
        scratch = tmp_path / name
        scratch.mkdir()
        environ = {**os.environ, "TMPDIR": str(scratch)}
        environ.pop("MLX_DISABLE_COMPILE", None)
        command = [sys.executable, "-m", "tests.engine.graph_kernels", model_folder("llama", wide=True), *numbers]
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        found.append(ran.stdout.split())
    few, more = found
    assert few, "what a model does between its layers' launches"
    assert more == few
