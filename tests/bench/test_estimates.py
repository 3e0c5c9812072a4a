"""The committed table of estimates is whole and within 3 %, and some of it is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.estimates import NOT_BUILT, measure
from tests.bench.estimates_geometry import GEOMETRIES
from tests.bench.estimates_geometry import measure as measured_geometry
from tests.inspect.architectures import SPECIAL

TABLE = Path(__file__).with_name("estimates.md")
UNMEASURED = {"minicpm": 2, "afm7": 1}
"""Rows without a figure: a sample that upstream's loader refuses, and what is never quantised."""


def rows(part: int = 0) -> list[list[str]]:
    """Of the architectures, or of one of the parts with a heading of its own."""
    lines = TABLE.read_text(encoding="utf-8").split("\n## ")[part].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]


def right(row: list[str]) -> bool:
    """Whether the error is what is written, and at most 3 %."""
    predicted, real = (int(cell.replace(",", "")) for cell in row[2:4])
    return abs(predicted / real - 1) <= 0.03 and row[4] == f"{predicted / real - 1:+.2%}"


def test_the_table_is_whole_and_right() -> None:
    assert {row[0] for row in rows()} == SPECIAL.keys() - NOT_BUILT
    assert all(sum(row[0] == kind for row in rows()) == 3 for kind in SPECIAL.keys() - NOT_BUILT)
    unmeasured = [row[0] for row in rows() if not row[4].endswith("%")]
    assert sorted(unmeasured) == sorted(kind for kind, count in UNMEASURED.items() for _ in range(count))
    assert all(right(row) for row in rows() if row[4].endswith("%"))


def test_the_table_of_real_sizes_is_right() -> None:
    found = rows(1)
    measured = [row for row in found if row[4].endswith("%")]
    assert {row[0] for row in found} == {"Llama-3.2-1B", "Llama-3.1-8B"}
    assert len(measured) >= 15
    assert all(right(row) for row in measured)


@pytest.mark.mlx
@pytest.mark.parametrize("compute", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_small_geometry_is_measured_again(compute: bool) -> None:
    tiny = GEOMETRIES["tiny"]
    found = [row for bits in (16, 4) for row in measured_geometry(tiny, bits, rows=3, context=300, compute=compute)]
    assert len(found) == 10
    for row in found:
        assert row.predicted == pytest.approx(row.real, rel=0.01), row


@pytest.mark.mlx
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3", "gemma3_text", "mamba2"])
def test_measured_again(kind: str, tmp_path: Path) -> None:
    for found, row in zip(measure(kind, tmp_path), [row for row in rows() if row[0] == kind], strict=True):
        assert (found.what, f"{found.predicted:,}", f"{found.real:,}") == tuple(row[1:4])


@pytest.mark.mlx
@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(SPECIAL.keys() - NOT_BUILT))
def test_all_measured_again(kind: str, tmp_path: Path) -> None:
    test_measured_again(kind, tmp_path)
