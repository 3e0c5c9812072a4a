"""SARIF 2.1.0, against the parts of its schema that are used; names and bounds are those of the OASIS document."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest

from runner.errors import Diagnostic
from runner.manifest.codes import registry
from runner.manifest.report import FileReport
from runner.manifest.sarif import render_sarif


def _mapping(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


TEXT = {"type": "string", "minLength": 1}
MESSAGE = _mapping(["text"], text=TEXT)
LEVEL = {"enum": ["none", "note", "warning", "error"]}
FROM_ONE = {"type": "integer", "minimum": 1}
RULE = _mapping(
    ["id"],
    id=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    defaultConfiguration=_mapping([], level=LEVEL),
)
PHYSICAL = _mapping(
    ["artifactLocation"],
    artifactLocation=_mapping(["uri"], uri={"type": "string", "format": "uri-reference"}, uriBaseId=TEXT),
    region=_mapping(
        ["startLine"], startLine=FROM_ONE, startColumn=FROM_ONE, snippet=_mapping([], text={"type": "string"})
    ),
)
LOCATION = _mapping(
    [],
    physicalLocation=PHYSICAL,
    logicalLocations={"type": "array", "uniqueItems": True, "items": _mapping([], fullyQualifiedName=TEXT)},
)
RESULT = _mapping(
    ["message"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=LEVEL,
    message=MESSAGE,
    locations={"type": "array", "items": LOCATION},
)
DRIVER = _mapping(["name"], name=TEXT, version=TEXT, rules={"type": "array", "uniqueItems": True, "items": RULE})
RUN = _mapping(
    ["tool"],
    tool=_mapping(["driver"], driver=DRIVER),
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    results={"type": "array", "items": RESULT},
)
SCHEMA = _mapping(
    ["version", "runs"],
    **{"$schema": {"type": "string", "format": "uri"}, "version": {"const": "2.1.0"}},
    runs={"type": "array", "items": RUN},
)

REPORTS = [
    FileReport(
        "a b/ü#1.yaml",
        (
            Diagnostic("a b/ü#1.yaml", 4, 7, "models.chat", "is wrong", "repair it", "  chat: 1", "E201"),
            Diagnostic("a b/ü#1.yaml", 5, 1, "x", "is open", code="W501", severity="warning"),
        ),
    ),
    FileReport("/abs/b.yaml", (Diagnostic("/abs/b.yaml", 0, 0, "", "there is no such file", code="E101"),)),
    FileReport("c.yaml"),
]


def _run(reports: list[FileReport]) -> dict[str, Any]:
    read = json.loads(render_sarif(reports))
    jsonschema.Draft7Validator(SCHEMA).validate(read)
    (run,) = read["runs"]
    return dict(run)


def test_rules_are_the_registry() -> None:
    driver = _run([])["tool"]["driver"]
    assert driver["name"] == "mlx-run"
    assert [rule["id"] for rule in driver["rules"]] == list(registry())
    assert {r["defaultConfiguration"]["level"] for r in driver["rules"]} == {"error", "warning"}
    unknown_key = next(rule for rule in driver["rules"] if rule["id"] == "E201")
    assert registry()["E201"].wrong in unknown_key["help"]["text"]


def test_results() -> None:
    run = _run(REPORTS)
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    assert [(r["ruleId"], r["level"], r["message"]["text"]) for r in run["results"]] == [
        ("E201", "error", "models.chat: is wrong (repair it)"),
        ("W501", "warning", "x: is open"),
        ("E101", "error", "there is no such file"),
    ]
    places = [r["locations"][0]["physicalLocation"] for r in run["results"]]
    assert places[0]["region"] == {"startLine": 4, "startColumn": 7, "snippet": {"text": "  chat: 1"}}
    assert "region" not in places[2]


def test_files_are_uris() -> None:
    run = _run(REPORTS)
    relative, _, absolute = (r["locations"][0]["physicalLocation"]["artifactLocation"] for r in run["results"])
    assert re.fullmatch(r"[A-Za-z0-9/._%~-]+", relative["uri"])
    assert (unquote(relative["uri"]), relative["uriBaseId"]) == ("a b/ü#1.yaml", "%SRCROOT%")
    assert absolute == {"uri": "file:///abs/b.yaml"}


def test_nothing_wrong_is_an_empty_list_of_results() -> None:
    assert _run([FileReport("c.yaml")])["results"] == []


def test_the_schema_here_refuses_what_sarif_refuses() -> None:
    read = json.loads(render_sarif(REPORTS))
    read["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(read)
