"""Diagnostics as SARIF 2.1.0 (OASIS), which code scanning reads: https://docs.oasis-open.org/sarif/sarif/v2.1.0/."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import quote

from runner.errors import Diagnostic
from runner.manifest.codes import Code, registry
from runner.manifest.formats import sentence
from runner.manifest.report import FileReport

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_Json = dict[str, Any]


def render_sarif(reports: Iterable[FileReport]) -> str:
    """One run with a result for each diagnostic; its rules are all codes of the registry. No final line break."""
    codes = registry()
    index = {code: at for at, code in enumerate(codes)}
    run = {
        "tool": {
            "driver": {"name": "mlx-run", "version": version("mlx-run"), "rules": [_rule(c) for c in codes.values()]}
        },
        "columnKind": "unicodeCodePoints",
        "results": [_result(found, index) for report in reports for found in report.diagnostics],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: Code) -> _Json:
    examples = f"\n\nWrong:\n\n{code.wrong}\nRight:\n\n{code.right}" if code.wrong else ""
    return {
        "id": code.code,
        "shortDescription": {"text": code.title},
        "fullDescription": {"text": code.explanation},
        "help": {"text": code.explanation + examples},
        "defaultConfiguration": {"level": code.severity},
    }


def _result(found: Diagnostic, index: dict[str, int]) -> _Json:
    location: _Json = {"physicalLocation": {"artifactLocation": _artifact(found.file)}}
    if found.line:
        region: _Json = {"startLine": found.line, "startColumn": found.column}
        if found.excerpt:
            region["snippet"] = {"text": found.excerpt}
        location["physicalLocation"]["region"] = region
    if found.path:
        location["logicalLocations"] = [{"fullyQualifiedName": found.path}]
    rule = {"ruleId": found.code, "ruleIndex": index[found.code]}
    return {**rule, "level": found.severity, "message": {"text": sentence(found)}, "locations": [location]}


def _artifact(file: str) -> _Json:
    """A relative path stays relative to the root of the sources, which is how code scanning finds the file."""
    path = PurePath(file)
    if path.is_absolute():
        return {"uri": path.as_uri()}
    return {"uri": quote(path.as_posix()), "uriBaseId": "%SRCROOT%"}
