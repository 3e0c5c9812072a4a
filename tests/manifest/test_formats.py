"""The forms for other programs, read back as those programs read them."""

from __future__ import annotations

import json
import re
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest

from runner.errors import Diagnostic
from runner.manifest.formats import render_github, render_json, render_junit
from runner.manifest.report import FileReport, render_diagnostics

PLACED = Diagnostic("a.yaml", 4, 7, "models.chat", 'is "wrong"', "repair it", "  chat: 1", "E201")
PLACELESS = Diagnostic("b.yaml", 0, 0, "", "there is no such file", code="E101")
WARNING = Diagnostic("c.yaml", 3, 2, "x", "is open", code="W501", severity="warning")
HOSTILE = Diagnostic(
    "dir,1/a:b%.yaml", 2, 3, "a.b", "100% of <it>,\r\nand\n::error::a \x07 & \x00\ud800", code="E103", excerpt="<&>"
)
REPORTS = [
    FileReport("a.yaml", (PLACED, HOSTILE)),
    FileReport("b.yaml", (PLACELESS,)),
    FileReport("c.yaml", (WARNING,)),
    FileReport("d.yaml"),
]


def test_warnings_do_not_make_a_file_unusable() -> None:
    assert [r.ok for r in REPORTS] == [False, False, True, True]


def test_json() -> None:
    read = json.loads(render_json(REPORTS))
    assert read["version"] == 1
    assert [(f["file"], f["ok"]) for f in read["files"]] == [(r.file, r.ok) for r in REPORTS]
    back = [[Diagnostic(**d) for d in f["diagnostics"]] for f in read["files"]]
    assert back == [list(r.diagnostics) for r in REPORTS]


def _command(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as the runner of GitHub Actions reads it."""
    match = re.fullmatch(r"::(\w+) (.*?)::(.*)", line)
    assert match
    properties = dict(part.split("=", 1) for part in match[2].split(","))
    return match[1], {key: unquote(value) for key, value in properties.items()}, unquote(match[3])


def test_github() -> None:
    commands = [_command(line) for line in render_github(REPORTS).split("\n")]
    assert commands == [
        (
            "error",
            {"file": "a.yaml", "line": "4", "col": "7", "title": "E201"},
            'models.chat: is "wrong" (repair it)',
        ),
        (
            "error",
            {"file": HOSTILE.file, "line": "2", "col": "3", "title": "E103"},
            f"a.b: {HOSTILE.message}",
        ),
        ("error", {"file": "b.yaml", "title": "E101"}, "there is no such file"),
        ("warning", {"file": "c.yaml", "line": "3", "col": "2", "title": "W501"}, "x: is open"),
    ]


@pytest.mark.parametrize("reports", [[], [FileReport("d.yaml")]])
def test_github_says_nothing_where_all_is_well(reports: list[FileReport]) -> None:
    assert render_github(reports) == ""


def test_junit() -> None:
    root = ET.fromstring(render_junit(REPORTS))
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "4", "2")
    assert [(s.get("name"), s.get("failures")) for s in root] == [
        ("a.yaml", "1"),
        ("b.yaml", "1"),
        ("c.yaml", "0"),
        ("d.yaml", "0"),
    ]
    cases = [suite.findall("testcase") for suite in root]
    assert [len(found) for found in cases] == [1] * 4
    failures = [found[0].find("failure") for found in cases]
    assert [f is not None for f in failures] == [True, True, False, False]
    several, one = failures[:2]
    assert several is not None
    assert one is not None
    assert (several.get("type"), several.get("message")) == ("E201, E103", "2 errors")
    assert (one.get("type"), one.get("message"), one.text) == (
        "E101",
        PLACELESS.message,
        "b.yaml: " + PLACELESS.message + " [E101]",
    )
    assert (several.text or "").startswith(render_diagnostics([PLACED]))
    assert "a \ufffd & \ufffd\ufffd [E103]" in (several.text or "")
    assert cases[2][0].findtext("system-out") == render_diagnostics([WARNING])
