"""`mlx-run explain`: one code, all codes, and a code that is none."""

from __future__ import annotations

import pytest

from runner.cli.main import main
from runner.manifest.codes import GROUPS, registry

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("written", ["E201", "e201", "[E201]"])
def test_one_code(written: str, capsys: Capture) -> None:
    assert main(["explain", written]) == 0
    shown = capsys.readouterr().out
    code = registry()["E201"]
    assert shown.startswith(f"E201: {code.title}\n\n")
    assert code.explanation.split()[-1] in shown
    assert f"Wrong:\n    {code.wrong.strip()}\n\nRight:\n    {code.right.strip()}\n" in shown


def test_a_code_without_an_example(capsys: Capture) -> None:
    assert main(["explain", "E101"]) == 0
    assert "Wrong:" not in capsys.readouterr().out


@pytest.mark.parametrize("code", registry())
def test_lines_fit_a_terminal(code: str, capsys: Capture) -> None:
    assert main(["explain", code]) == 0
    prose = capsys.readouterr().out.partition("Wrong:")[0]
    assert max(map(len, prose.splitlines())) <= 100


def test_all_codes(capsys: Capture) -> None:
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(registry())
    headings = [line for line in lines if not line.startswith("  ")]
    assert len(headings) == len(set(headings))
    assert {heading.partition(": ")[2] for heading in headings} == set(GROUPS.values())


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("W5O1", 'did you mean "W501"?'),
        ("W51", 'did you mean "W501"?'),
        ("nonsense", "`mlx-run explain` lists all codes."),
    ],
)
def test_an_unknown_code(written: str, hint: str, capsys: Capture) -> None:
    assert main(["explain", written]) == 1
    shown = capsys.readouterr().err
    assert shown == f"error: there is no code '{written}'\n{hint}\n"
