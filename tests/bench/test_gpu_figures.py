"""The driver of the GPU's benchmarks, on what there is, scaled down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.bench.record import Budget, Record

DRIVER = Path(__file__).with_name("gpu_figures.py")


def test_rows_and_notes_are_there_as_soon_as_they_are_known(tmp_path: Path) -> None:
    record = Record(tmp_path, "kv", "a cache")
    record.row({"rows": "1", "rate": "2.5"}, {"rows": 1, "rate": 2.5})
    record.row({"rows": "4", "rate": "9.0"}, {"rows": 4, "rate": 9.0})
    record.row({"other": "x"}, {})
    lines = (tmp_path / "figures.md").read_text().split("\n")
    assert lines[1:7] == ["**a cache**", "", "| rows | rate |", "| ---: | ---: |", "| 1 | 2.5 |", "| 4 | 9.0 |"]
    assert lines[-3:] == ["| ---: |", "| x |", ""]
    entries = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert entries[1] == {"section": "kv", "figures": {"rows": 4, "rate": 9.0}}


def test_a_section_that_left_something_out_is_not_finished(tmp_path: Path) -> None:
    for name, missing in (("whole", []), ("part", ["128 clients"])):
        record = Record(tmp_path, name)
        for what in missing:
            record.left_out(what)
        record.finish()
    entries = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [entry["section"] for entry in entries if "finished" in entry] == ["whole"]


def test_a_budget_ends_with_the_one_that_it_is_within() -> None:
    assert Budget(0).over
    assert Budget(0).within(100).over
    assert not Budget(100).within(None).over
    assert Budget(None).left == float("inf")
    assert Budget(None).within(0).over


def drive(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), str(folder), "--geometry", "tiny", *options],
        capture_output=True,
        text=True,
        check=False,
    )


def finished(folder: Path) -> set[str]:
    path = folder / "figures.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["section"] for entry in map(json.loads, lines) if "finished" in entry}


def left(folder: Path) -> list[str]:
    """Processes that have to do with a folder."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line and "pytest" not in line]


@pytest.mark.mlx
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_every_section_comes_to_its_end(tmp_path: Path) -> None:
    short = drive(tmp_path, "--budget", "8")
    assert short.returncode == 0, short.stdout[-4000:] + short.stderr
    assert left(tmp_path) == [], "what was cut off is gone"
    before = finished(tmp_path)
    whole = drive(tmp_path, "--rest")
    assert whole.returncode == 0, whole.stdout[-4000:] + whole.stderr
    over_http = {"levels", "loop", "adapters", "join", "changes"}
    alone = {"speculation", "kv", "prefix", "start", "attention", "sampled"}
    assert finished(tmp_path) == over_http | alone, whole.stdout[-4000:]
    assert not before or f"{', '.join(sorted(before))}:" not in whole.stdout
    assert left(tmp_path) == []
