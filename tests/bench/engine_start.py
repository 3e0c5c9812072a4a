"""From starting an engine process to the first token of a chat, as the runner starts one.

    python tests/bench/engine_start.py [FOLDER] [--repeat 15]

Without a folder, demo-chat. The first start is not counted: it reads the files from the disk, and keeps their bytecode,
as an installation has it, whatever PYTHONDONTWRITEBYTECODE says; with --compile every start compiles what has none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.protocol import Generate, Loaded, Step  # noqa: E402
from tests.bench.record import Budget, Record, add_options  # noqa: E402
from tests.engine.client import engine_child  # noqa: E402


def first_token(scratch: Path, model: Path) -> tuple[float, float]:
    """Seconds until the engine says that it is ready, and until the first token of a request that waited for that."""
    began = time.perf_counter()
    with engine_child(scratch, model) as child:
        client = child.connect()
        client.wait(Loaded)
        ready = time.perf_counter() - began
        client.send(Generate(id=1, messages=[{"role": "user", "content": "What is 17 + 25?"}], max_tokens=4))
        client.wait(Step)
        return ready, time.perf_counter() - began


def main() -> None:
    """Parse, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "examples" / "models" / "demo-chat")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="keep no bytecode")
    add_options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as bytecode:
        if arguments.compile:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        else:
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            os.environ["PYTHONPYCACHEPREFIX"] = bytecode
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Start it again and again, and print."""
    budget = Budget(arguments.budget)
    found: list[tuple[float, float]] = []
    for number in range(arguments.repeat + 1):
        with tempfile.TemporaryDirectory() as scratch:
            figures = first_token(Path(scratch), arguments.folder)
        if number:
            found.append(figures)
            if budget.over:
                break
    record = Record(arguments.record, "start", f"starting an engine of {arguments.folder.name}")
    for name, seconds in zip(("ready", "first token"), zip(*found, strict=True), strict=True):
        values = sorted(1000 * s for s in seconds)
        spread = f"{values[0]:.0f} to {values[-1]:.0f}, n={len(values)}"
        record.row(
            {"until": name, "ms": f"{statistics.median(values):.0f}", "of": spread}, {"until": name, "ms": values}
        )
    record.finish()


if __name__ == "__main__":
    main()
