"""The CI examples: their steps are run here as they are written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "examples" / "ci" / "github-actions.yaml"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A checkout's, with `mlx-run` on the path and the workflow's variables."""
    commands = tmp_path / "bin"
    commands.mkdir()
    command = commands / "mlx-run"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m runner.cli.main "$@"\n')
    command.chmod(0o755)
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return {
        **os.environ,
        **job["env"],
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLX_RUN_STATE_DIR": str(tmp_path / "state"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }


def steps() -> dict[str, str]:
    """The workflow's own commands by the names of their steps."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


def run(step: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it."""
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps()[step]]
    return subprocess.run(shell, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def checkout(folder: Path) -> Path:
    """A repository that has one sound and one broken manifest."""
    (folder / "configs").mkdir(parents=True)
    for name in ("dev", "minimal"):
        text = (ROOT / "configs" / f"{name}.yaml").read_text().replace("../examples", str(ROOT / "examples"))
        (folder / "configs" / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.nightly
def test_sound_manifests_pass_every_step(environment: dict[str, str], tmp_path: Path) -> None:
    folder = checkout(tmp_path / "repository")
    for step in steps():
        if step != "Install":
            done = run(step, environment, folder)
            assert done.returncode == 0, done.stderr
    summary = Path(environment["GITHUB_STEP_SUMMARY"]).read_text()
    assert summary.count("models.demo-chat") == 2
    assert summary.count("```") == 4
    assert json.loads((folder / "mlx-run.sarif").read_text())["runs"][0]["results"] == []


def test_a_broken_one_fails_the_check_and_still_reaches_code_scanning(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = checkout(tmp_path / "repository")
    broken = folder / "configs" / "minimal.yaml"
    broken.write_text(broken.read_text().replace("port:", "prot:"))
    annotated = run("Annotate what is wrong", environment, folder)
    assert annotated.returncode == 1
    line = next(i for i, text in enumerate(broken.read_text().splitlines(), 1) if "prot" in text)
    assert re.search(rf"^::error file=configs/minimal.yaml,line={line},col=\d+,.*prot", annotated.stdout, re.MULTILINE)
    assert run("Write what is wrong for code scanning", environment, folder).returncode == 0
    (scan,) = json.loads((folder / "mlx-run.sarif").read_text())["runs"]
    places = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in scan["results"]]
    assert places
    assert set(places) == {"configs/minimal.yaml"}


def test_the_workflow_may_do_what_it_does() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = workflow["jobs"].values()
    uses = [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step]
    assert uses == ["actions/checkout", "actions/setup-python", "github/codeql-action/upload-sarif"]
    assert workflow["permissions"] == {"contents": "read", "security-events": "write"}


def test_junit_is_what_others_read(environment: dict[str, str], tmp_path: Path) -> None:
    folder = checkout(tmp_path / "repository")
    (folder / "configs" / "minimal.yaml").write_text("name: [\n")
    command = ["mlx-run", "validate", "--format", "junit", "configs/dev.yaml", "configs/minimal.yaml"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    suites = ET.fromstring(done.stdout).findall(".//testsuite")
    assert sum(int(suite.get("tests", 0)) for suite in suites) == 2
    assert sum(int(suite.get("failures", 0)) + int(suite.get("errors", 0)) for suite in suites) == 1


def hooks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    return found


def test_the_hook_checks_the_files_that_it_is_given(environment: dict[str, str], tmp_path: Path) -> None:
    folder = checkout(tmp_path / "repository")
    (hook,) = hooks()
    command = [*shlex.split(hook["entry"]), "configs/dev.yaml", "configs/minimal.yaml"]
    (folder / "configs" / "dev.yaml").write_text("nam: x\n")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "configs/dev.yaml:1:1" in done.stderr
    assert "minimal.yaml" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "checked"),
    [("mlx-run.yaml", True), ("a/mlx-run.prod.yml", True), ("a/other.yaml", False), ("not-mlx-run.yaml", False)],
)
def test_the_hook_looks_at_manifests_by_their_names(path: str, checked: bool) -> None:
    (hook,) = hooks()
    assert bool(re.search(hook["files"], path)) is checked
