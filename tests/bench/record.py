"""Where benchmarks put what they have found, as soon as they have: a machine may go away before they end.

FOLDER/figures.jsonl has a line of JSON a figure, FOLDER/figures.md the same as tables. Both are appended to, so that
several runs share a folder. Without a folder, rows are only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BEGAN = time.monotonic()


def progress(text: str) -> None:
    """Says what is done, or begun, and how many seconds after the start of this process."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


class Budget:
    """Seconds that something may take; None for as long as it likes."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether none are."""
        return self.left <= 0

    def within(self, seconds: float | None) -> Budget:
        """One that is over with this one, or after `seconds`."""
        least = min(self.left, float("inf") if seconds is None else seconds)
        return Budget(None if least == float("inf") else least)


class Record:
    """The tables of one section under a title, and its lines of JSON."""

    def __init__(self, folder: Path | None, section: str, title: str = "") -> None:
        self.folder = folder
        self.section = section
        self._title = title or section
        self._columns: Sequence[str] = ()
        self._complete = True
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, value: Any) -> None:
        """One line of JSON that is in no table: versions, a device, why something is missing."""
        self._append("figures.jsonl", json.dumps({"section": self.section, name: value}) + "\n")

    def left_out(self, what: str) -> None:
        """Something for which there is no time."""
        self._complete = False
        progress(f"{self.section}: no time left for {what}")
        self.note("left_out", what)

    def finish(self) -> None:
        """The section has ended; that is noted if nothing was left out."""
        if self._complete:
            self.note("finished", time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def row(self, cells: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        """A row of a table, whose columns are those of `cells`, and what is behind it."""
        lines = []
        if tuple(cells) != self._columns:
            self._columns = tuple(cells)
            title = "" if self.folder is None else f"\n**{self._title}**\n\n"
            lines += [title + _line(self._columns), _line(["---:"] * len(cells))]
        lines.append(_line(cells.values()))
        self._append("figures.md", "\n".join(lines) + "\n")
        self.note("figures", figures)
        for line in lines:
            print(line, flush=True)

    def _append(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks that write records take."""
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="append figures.jsonl and figures.md there")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end by itself then, with what there is")
