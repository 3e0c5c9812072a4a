"""Diagnostics for other programs: a JSON object, GitHub's annotations, JUnit's XML. SARIF is in `sarif`.

All take one report a file, and give text without a final line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final
from xml.etree import ElementTree as ET

from runner.errors import Diagnostic
from runner.manifest.report import FileReport, render_diagnostics

JSON_VERSION: Final = 1
"""Goes up where a reader of the JSON form would break: a field that goes, or means something else."""

_NOT_XML: Final = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # XML 1.0, section 2.2


def render_json(reports: Iterable[FileReport]) -> str:
    """`{"version": 1, "files": [{"file", "overlays", "ok", "diagnostics": [{"code", "severity", "file", …}]}]}`.

    A diagnostic names the file it is in, which may be an overlay; `notes` say what could not be looked at, and `memory`
    is there where it was asked for.
    """
    files: list[dict[str, Any]] = []
    for report in reports:
        found = [d._asdict() for d in report.diagnostics]
        entry = {"file": report.file, "overlays": report.overlays, "ok": report.ok, "diagnostics": found}
        memory = {} if report.memory is None else {"memory": report.memory}
        files.append(entry | {"notes": report.notes} | memory)
    return json.dumps({"version": JSON_VERSION, "files": files}, indent=2)


def render_github(reports: Iterable[FileReport]) -> str:
    """A workflow command for each diagnostic, which GitHub Actions shows at the line; empty where there is none."""
    return "\n".join(_annotation(diagnostic) for report in reports for diagnostic in report.diagnostics)


def _annotation(found: Diagnostic) -> str:
    properties = {"file": found.file, "title": found.code}
    if found.line:
        properties = {"file": found.file, "line": str(found.line), "col": str(found.column), "title": found.code}
    written = ",".join(f"{key}={_github_property(value)}" for key, value in properties.items() if value)
    return f"::{found.severity} {written}::{_github_data(sentence(found))}"


def _github_data(text: str) -> str:
    """Escaped as `@actions/core` does it for the part after the second `::`."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _github_property(text: str) -> str:
    return _github_data(text).replace(":", "%3A").replace(",", "%2C")


def sentence(found: Diagnostic) -> str:
    """Path, message and hint in one line, for formats that have fields of their own for place and code."""
    text = f"{found.path}: {found.message}" if found.path else found.message
    return f"{text} ({found.hint})" if found.hint else text


def render_junit(reports: Sequence[FileReport]) -> str:
    """A test suite with one test case a file. Its failure has all errors, since many readers take one failure only."""
    failed = sum(not r.ok for r in reports)
    root = ET.Element("testsuites", name="mlx-run validate", tests=str(len(reports)), failures=str(failed))
    for report in reports:
        name = _xml(report.title)
        suite = ET.SubElement(root, "testsuite", name=name, tests="1", failures=str(int(not report.ok)))
        case = ET.SubElement(suite, "testcase", classname="mlx-run.validate", name=name)
        if report.errors:
            codes = ", ".join(dict.fromkeys(d.code for d in report.errors if d.code))
            message = f"{len(report.errors)} errors" if len(report.errors) > 1 else sentence(report.errors[0])
            failure = ET.SubElement(case, "failure", type=codes, message=_xml(message))
            failure.text = _xml(render_diagnostics(report.errors))
        if warnings := [d for d in report.diagnostics if d.severity == "warning"]:
            ET.SubElement(case, "system-out").text = _xml(render_diagnostics(warnings))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def _xml(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return re.sub(_NOT_XML, "\ufffd", text)
