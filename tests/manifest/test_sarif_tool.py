"""SARIF by the standard's own schema and rules, as Microsoft's Sarif.Multitool (MIT) carries them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from tests.manifest.npm import install

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def multitool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    modules = install(tmp_path_factory.mktemp("npm"), "@microsoft/sarif-multitool")
    (tool,) = modules.glob("@microsoft/sarif-multitool-*/Sarif.Multitool")
    tool.chmod(0o755)
    return tool


def findings(multitool: Path, sarif: Path) -> list[dict[str, Any]]:
    """What the validator says of a file, as it writes it: in SARIF."""
    report = sarif.with_suffix(".report.sarif")
    environment = {**os.environ, "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1"}
    command = [str(multitool), "validate", str(sarif), "--output", str(report), "--log", "ForceOverwrite"]
    subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
    (run,) = json.loads(report.read_text(encoding="utf-8-sig"))["runs"]
    found: list[dict[str, Any]] = run.get("results", [])
    return found


def written(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What `validate` says of a file full of mistakes, and of one that does not exist."""
    bad = folder / "bad ü.yaml"
    bad.write_text("name: x\nservrs: {}\nmodels: {a: {source: nope, kv_cache: {bits: 5000}, aliases: [1, 2]}}\n")
    assert main(["validate", "--format", "sarif", str(bad), str(folder / "none.yaml"), "configs/dev.yaml"]) == 1
    path = folder / "out.sarif"
    path.write_text(capsys.readouterr().out)
    return path


def test_it_is_valid(multitool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, capsys)
    assert len(json.loads(path.read_text())["runs"][0]["results"]) >= 4
    assert [f for f in findings(multitool, path) if f.get("level", "warning") == "error"] == []


def test_the_validator_finds_what_is_wrong(multitool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, capsys)
    read = json.loads(path.read_text())
    read["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    read["runs"][0]["results"][1]["ruleIndex"] = 10_000
    path.write_text(json.dumps(read))
    assert [f for f in findings(multitool, path) if f.get("level", "warning") == "error"]
