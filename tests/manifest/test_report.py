"""Diagnostics as a person reads them."""

from __future__ import annotations

from runner.errors import Diagnostic
from runner.manifest.report import render_diagnostics


def test_with_and_without_a_place_a_path_a_hint_and_an_excerpt() -> None:
    found = [
        Diagnostic("a.yaml", 12, 3, "models.x", "is wrong", "repair it", "  x: 1"),
        Diagnostic("a.yaml", 3, 1, "", "is wrong", "", "x"),
        Diagnostic("a.yaml", 3, 1, "x", "is wrong", "repair it"),
        Diagnostic("a.yaml", 0, 0, "", "is wrong", "repair it"),
        Diagnostic("a.yaml", 0, 0, "", "is wrong"),
    ]
    assert render_diagnostics(found).split("\n") == [
        "a.yaml:12:3: models.x: is wrong",
        "   12 |   x: 1",
        "      |   ^ repair it",
        "a.yaml:3:1: is wrong",
        "    3 | x",
        "      | ^",
        "a.yaml:3:1: x: is wrong",
        "  hint: repair it",
        "a.yaml: is wrong",
        "  hint: repair it",
        "a.yaml: is wrong",
    ]


def test_a_code_stands_behind_the_message_and_a_warning_is_called_one() -> None:
    error = Diagnostic("a.yaml", 12, 3, "models.x", "is wrong", "repair it", "  x: 1", "E201")
    warning = error._replace(code="W501", severity="warning")
    placeless = Diagnostic("a.yaml", 0, 0, "", "is wrong", "repair it", code="E101")
    assert render_diagnostics([error, warning]).split("\n")[::3] == [
        "a.yaml:12:3: models.x: is wrong [E201]",
        "a.yaml:12:3: warning: models.x: is wrong [W501]",
    ]
    assert render_diagnostics([placeless]) == "a.yaml: is wrong [E101]\n  hint: repair it"
    assert str(error) == "a.yaml:12:3: models.x: is wrong [E201] (repair it)"


def test_the_caret_stands_below_its_place() -> None:
    (_, line, caret) = render_diagnostics([Diagnostic("a", 1, 6, "x", "m", "", "\t模a: b")]).split("\n")
    assert line == "    1 | \t模a: b"
    assert caret == "      | \t     ^"


def test_nothing() -> None:
    assert render_diagnostics([]) == ""
