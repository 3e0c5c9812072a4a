"""`mlx-run validate` as CI and people call it: what goes to which stream, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from runner.cli.main import main

SOUND = "name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n"
OPEN = "name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: org/chat}}\n"
WRONG = "name: dev\nservers: {main: {port: 80800}}\nmodels: {chat: {sorce: ./chat}}\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"sound": SOUND, "open": OPEN, "wrong": WRONG}.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


def _validate(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["validate", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_text(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "sound.yaml", "wrong.yaml")
    assert (code, out) == (1, "sound.yaml: ok (1 models, 1 servers)\n")
    assert [line for line in err.splitlines() if line.startswith("wrong.yaml:")] == [
        "wrong.yaml:2:24: servers.main.port: should be at most 65535, not 80800 [E204]",
        'wrong.yaml:3:17: models.chat.sorce: unknown key "sorce" [E201]',
    ]


def test_a_warning_is_shown_and_passes(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "open.yaml")
    assert (code, out) == (0, "open.yaml: ok (1 models, 1 servers)\n")
    assert err.startswith("open.yaml:3:25: warning: models.chat.source: org/chat (main) ")


def test_strict_makes_an_error_of_a_warning(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "--strict", "open.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("open.yaml:3:25: models.chat.source: org/chat (main) ")
    assert _validate(capsys, "--strict", "sound.yaml")[0] == 0


def test_quiet_shows_errors_only(capsys: Capture) -> None:
    assert _validate(capsys, "-q", "sound.yaml", "open.yaml") == (0, "", "")
    assert _validate(capsys, "-q", "wrong.yaml")[2] != ""
    assert _validate(capsys, "-q", "--strict", "open.yaml")[2] != ""


@pytest.mark.parametrize("style", ["json", "github", "sarif", "junit"])
def test_forms_for_programs_go_to_standard_output(style: str, capsys: Capture) -> None:
    code, out, err = _validate(capsys, "--format", style, "sound.yaml", "wrong.yaml", "none.yaml")
    assert (code, err) == (1, "")
    assert all(text in out for text in ("wrong.yaml", "none.yaml", "E204", "E201", "E101"))
    assert _validate(capsys, "--format", style, "sound.yaml", "open.yaml")[0] == 0
    assert _validate(capsys, "--format", style, "--strict", "open.yaml")[0] == 1


def test_strict_counts_in_every_form(capsys: Capture) -> None:
    out = {
        style: _validate(capsys, "--strict", "--format", style, "open.yaml")[1]
        for style in ("json", "github", "sarif", "junit")
    }
    (file,) = json.loads(out["json"])["files"]
    assert (file["ok"], file["diagnostics"][0]["severity"]) == (False, "error")
    assert out["github"].startswith("::error file=open.yaml,line=3,col=25,title=W601::")
    assert json.loads(out["sarif"])["runs"][0]["results"][0]["level"] == "error"
    assert ET.fromstring(out["junit"]).get("failures") == "1"


def test_no_form_shows_a_secret(capsys: Capture) -> None:
    text = SOUND.replace("port: 8080", "port: 0, auth: {api_keys: [sk-secret-1]}")
    Path("secret.yaml").write_text(text, encoding="utf-8")
    for style in ("text", "json", "github", "sarif", "junit"):
        code, out, err = _validate(capsys, "--format", style, "secret.yaml")
        assert code == 1
        assert "E204" in out + err
        assert "sk-secret" not in out + err


def test_text_imports_no_other_form() -> None:
    code = (
        "import sys; from runner.cli.main import main; main(['validate', 'sound.yaml'])\n"
        "heavy = {'xml.etree.ElementTree', 'tomllib', 'runner.manifest.formats'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env={"PYTHONPATH": root}
    )
    assert result.returncode == 0, result.stderr
