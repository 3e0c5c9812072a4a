"""All figures that the engine is to show on a GPU, one section after the other, the most worth first.

    python tests/bench/gpu_figures.py FOLDER [--only levels,loop,…] [--rest] [--budget 560] [--geometry llama-1b]

Each section is a benchmark of this folder in a process of its own, with a time of its own; those over HTTP share their
servers. FOLDER gets their figures as they are found (`figures.jsonl`, `figures.md`), their output and the servers'
logs. Whatever a section has started ends with it. The model's files are kept in FOLDER/model-GEOMETRY for the next
call; `--rest` leaves out the sections that an earlier one has finished.

    levels, loop, adapters, join    versus_mlx_lm.py: over HTTP, beside mlx_lm.server where it takes part
    changes                         adapter_changes.py: requests with another adapter than the one before
    speculation, sampled            speculation.py: greedy, and at temperature 0.7 with top_p 0.9
    kv                              kv_quantised.py: bytes and rate of a quantised cache at 16,384 tokens
    prefix                          prefix_hit.py: a prompt of 4,096 tokens that is known
    start                           engine_start.py: demo-chat from a process to its first token
    attention                       kv_attention.py: a layer's attention at 16,384 tokens, in several ways
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import IO, Final

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.record import Budget, progress  # noqa: E402

GEOMETRIES: Final = ("llama-1b", "small", "tiny")


@dataclass(frozen=True)
class Section:
    """`script` with `options`; `seconds` to measure in, after `before` to get there.

    With another geometry than the real one it takes the options `scaled_down`.
    """

    name: str
    script: str
    seconds: float
    before: float
    options: tuple[str, ...] = ()
    scaled_down: tuple[str, ...] = ()


_SERVED, _CHANGES = "versus_mlx_lm.py", "adapter_changes.py"
_ENDING: Final = 15.0
"""Seconds that servers have to end in."""
_SCALED_DOWN = (
    "--clients=1,4,16",
    "--loop-clients=1,4",
    "--adapter-clients=4",
    "--max-rows=16",
    "--repeat=1",
    "--turns=4",
)
_SCALED_DOWN += ("--prompt-tokens=64", "--max-tokens=16", "--join-tokens=64", "--limit=20")
_ROWS = ("--rows", "1", "4", "16", "32", "128")
_SAMPLED = ("--temperature", "0.7", "--top-p", "0.9")
_WAYS = ("fast, no mask", "grouped", "8 bits", "8 bits, in parts", "4 bits", "4 bits, in parts")
_FEW = ("--rows", "1", "4", "--tokens", "32", "--repeat", "2")
# 128 clients come last: the peer takes its whole limit for them, and is replaced.
_OVER_HTTP = ("--clients=1,8,32,512,128", "--limit=60")
SECTIONS: Final = (
    Section("levels", _SERVED, 300, 100, _OVER_HTTP, _SCALED_DOWN),
    Section("loop", _SERVED, 70, 100, _OVER_HTTP, _SCALED_DOWN),
    Section("adapters", _SERVED, 90, 100, _OVER_HTTP, _SCALED_DOWN),
    Section("join", _SERVED, 50, 100, _OVER_HTTP, _SCALED_DOWN),
    # The peer compiles for half a minute before its first figure.
    Section("changes", _CHANGES, 40, 100, (), ("--repeat", "1")),
    Section("speculation", "speculation.py", 100, 60, (*_ROWS, "--repeat", "3"), _FEW),
    # 16 and 8 bits only: each format has kernels of its own, which are compiled when they are first called.
    Section(
        "kv", "kv_quantised.py", 90, 60, ("--bits", "16", "8", "--prefill"), ("--context", "1024", "--tokens", "8")
    ),
    Section("prefix", "prefix_hit.py", 60, 60, (), ("--prompt", "1024", "--repeat", "2")),
    Section("start", "engine_start.py", 30, 30, (), ("--repeat", "3")),
    Section(
        "attention",
        "kv_attention.py",
        60,
        60,
        ("--rows", "1", "4", "--context", "16384", "--ways", *_WAYS),
        ("--rows", "1", "--context", "1024", "--ways", *_WAYS),
    ),
    Section("sampled", "speculation.py", 80, 60, (*_ROWS, *_SAMPLED, "--repeat", "3"), (*_FEW, *_SAMPLED)),
)


class Run:
    """One call of this script."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.folder
        self._geometry: str = arguments.geometry
        self._budget = Budget(arguments.budget)
        self.folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> set[str]:
        """Sections that are finished."""
        path = self.folder / "figures.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {entry["section"] for entry in map(json.loads, lines) if entry.get("finished")}

    def group(self, sections: Sequence[Section]) -> None:
        """Sections of one script, which share what it starts."""
        names = [section.name for section in sections]
        seconds = min(sum(section.seconds for section in sections), self._budget.left - 5)
        if seconds <= 0:
            progress(f"no time left for {', '.join(names)}")
            return
        progress(f"{', '.join(names)}: {seconds:.0f} s")
        most = min(seconds + max(section.before for section in sections), self._budget.left)
        self._call("-".join(names), self._command(sections, seconds, most), most)

    def _command(self, sections: Sequence[Section], seconds: float, most: float) -> list[str]:
        first = sections[0]
        full = self._geometry == "llama-1b"
        command = [sys.executable, str(ROOT / "tests" / "bench" / first.script)]
        command += [*(first.options if full else first.scaled_down)]
        command += ["--record", str(self.folder), "--budget", f"{seconds:.0f}"]
        if first.script not in ("engine_start.py", "kv_attention.py"):
            command += ["--geometry", self._geometry]
        if first.script in (_SERVED, _CHANGES):
            command += ["--folder", str(self.folder / f"model-{self._geometry}")]
        if first.script == _SERVED:
            command += ["--until", f"{max(0.0, most - _ENDING):.0f}"]
            command += ["--sections", ",".join(section.name for section in sections)]
            command += ["--budgets", ",".join(f"{section.name}={section.seconds:.0f}" for section in sections)]
        return command

    def _call(self, name: str, command: list[str], seconds: float) -> None:
        """Run it, for so long at most. Its output goes to FOLDER/NAME.log, and on."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        assert process.stdout is not None
        copying = threading.Thread(target=_copy, args=(process.stdout, self.folder / f"{name}.log"), daemon=True)
        copying.start()
        try:
            progress(f"{name}: exit status {process.wait(seconds)}")
        except subprocess.TimeoutExpired:
            progress(f"{name}: not ended after {seconds:.0f} s")
        finally:
            _end(process)
            copying.join(5)


def _copy(source: IO[bytes], log: Path) -> None:
    with log.open("ab") as file:
        for line in source:
            file.write(line)
            file.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, which ends what it has started, and then whatever is left of that, one by one."""
    below = _below(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = [one for one in below if one.is_running()]
    for one in left:
        try:
            one.kill()
            progress(f"killed {one.pid}")
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(left, timeout=10)


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _groups(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Neighbours that share servers."""
    for served, neighbours in groupby(sections, lambda section: section.script == _SERVED):
        group = list(neighbours)
        yield from [group] if served else [[section] for section in group]


def main() -> None:
    """Parse, run, print what there is."""
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[section.name for section in SECTIONS])
    parser.add_argument("--rest", action="store_true", help="leave out what an earlier call has finished")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all sections together")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-1b", help="others run what is scaled down")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - {section.name for section in SECTIONS}:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    run = Run(arguments)
    done = run.done() if arguments.rest else set()
    wanted = [section for section in SECTIONS if section.name in arguments.only and section.name not in done]
    for group in _groups(wanted):
        run.group(group)
    figures = run.folder / "figures.md"
    print(figures.read_text() if figures.exists() else "no figures")


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(f"ended by signal {number}")


if __name__ == "__main__":
    main()
