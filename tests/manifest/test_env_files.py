"""`env_file`: which variables there are then, which of two wins, and what is said of a file that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.inputs import Inputs
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics

from .conftest import Load, Refused

MANIFEST = """
name: dev
env_file: {files}
servers: {{main: {{port: 8080, auth: {{api_keys: ["${{KEY}}"]}}}}}}
models: {{chat: {{source: "./${{FOLDER:-chat}}"}}}}
"""


def _values(load: Load, tmp_path: Path, text: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    """What KEY and FOLDER come to with this env file."""
    (tmp_path / "one.env").write_text(dedent(text), encoding="utf-8")
    manifest = load(MANIFEST.format(files="one.env"), env or {}).manifest
    auth = manifest.servers["main"].auth
    assert auth is not None
    return (auth.api_keys or [])[0].get_secret_value(), manifest.models["chat"].source


@pytest.mark.parametrize(
    ("text", "key", "folder"),
    [
        ("KEY=one\n", "one", "./chat"),
        ("\ufeffKEY=one\r\nFOLDER=x\r\n", "one", "./x"),
        ("# a comment\n\nexport KEY=one  # more\nFOLDER='x'\n", "one", "./x"),
        ('KEY="a\\tb"\n'.replace("\\t", "\\u0041"), "a\\u0041b", "./chat"),
        ("KEY='${NOT_THIS}'\n", "${NOT_THIS}", "./chat"),
        ("KEY=one\nFOLDER=${KEY}/x\n", "one", "./one/x"),
        ('KEY=one\nFOLDER="${NOPE:-y}"\n', "one", "./y"),
        ("KEY=p#w$2\n", "p#w$2", "./chat"),
        ("KEY=one\nKEY=two\n", "two", "./chat"),
        ("KEY=one\nFOLDER=\n", "one", "./chat"),
    ],
)
def test_values(text: str, key: str, folder: str, load: Load, tmp_path: Path) -> None:
    assert _values(load, tmp_path, text) == (key, folder)


def test_the_environment_wins(load: Load, tmp_path: Path) -> None:
    assert _values(load, tmp_path, "KEY=file\nFOLDER=${KEY}\n", {"KEY": "env"}) == ("env", "./env")
    assert _values(load, tmp_path, "KEY=file\nFOLDER=x\n", {"FOLDER": ""}) == ("file", "./chat")


def test_a_name_without_a_value_is_that_of_the_environment(load: Load, tmp_path: Path) -> None:
    assert _values(load, tmp_path, "KEY\nFOLDER=x\n", {"KEY": "env"}) == ("env", "./x")


def test_later_files_win_and_some_may_be_missing(load: Load, tmp_path: Path) -> None:
    (tmp_path / "one.env").write_text("KEY=one\nFOLDER=one\n")
    (tmp_path / "two.env").write_text("FOLDER=${KEY}two\n")
    loaded = load(MANIFEST.format(files="[one.env, {path: no.env, required: false}, {path: two.env}]"))
    assert loaded.manifest.models["chat"].source == "./onetwo"
    assert loaded.inputs.files[tmp_path / "no.env"] is None
    assert set(loaded.files) == {tmp_path / name for name in ("dev.yaml", "one.env", "no.env", "two.env")}


def test_the_files_themselves_are_named_with_variables_of_the_environment(load: Load, tmp_path: Path) -> None:
    (tmp_path / "prod.env").write_text("KEY=one\nSTAGE=other\n")
    files = '"${STAGE}.env"'
    assert load(MANIFEST.format(files=files), {"STAGE": "prod"}).manifest.name == "dev"


def test_paths_start_in_the_folder_of_the_file_that_says_them(tmp_path: Path) -> None:
    base, over = tmp_path / "base.yaml", tmp_path / "over" / "prod.yaml"
    over.parent.mkdir()
    base.write_text(MANIFEST.format(files="values.env"))
    over.write_text("env_file: values.env\n")
    (over.parent / "values.env").write_text("KEY=over\n")
    auth = load_manifest([base, over], {}).manifest.servers["main"].auth
    assert auth is not None
    assert [key.get_secret_value() for key in auth.api_keys or ()] == ["over"]


def test_what_is_wrong_in_an_env_file_is_told_at_its_line_and_not_shown(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.env").write_text("KEY=sk-1\n\n\nthis is no sk-2\nA='open sk-3\nB=${NOPE}sk-4\n")
    found = refused(MANIFEST.format(files="one.env"))
    assert [(Path(d.file).name, d.line, d.code) for d in found] == [
        ("one.env", 4, "E509"),
        ("one.env", 5, "E509"),
        ("one.env", 6, "E509"),
    ]
    assert "NOPE is not set" in found[2].message
    assert "sk-" not in render_diagnostics(found)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe", "not UTF-8 text"), (b"#" * (2**20 + 1), "larger than 1024 KiB")]
)
def test_files_that_cannot_be_read(content: bytes, reason: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "one.env").write_bytes(content)
    (found,) = refused(MANIFEST.format(files="one.env"))
    assert (found.code, found.path) == ("E508", "env_file")
    assert reason in found.message


def test_a_missing_file_is_one_error_and_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_text(MANIFEST.format(files="[no.env]"))
    inputs = Inputs()
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, {}, inputs)
    assert [(d.code, d.path) for d in caught.value.diagnostics] == [("E508", "env_file[0]")]
    assert inputs.files[tmp_path / "no.env"] is None
    before = inputs.now()
    (tmp_path / "no.env").write_text("KEY=x\n")
    assert inputs.now() != before


def _paths(found: list[Diagnostic]) -> set[tuple[str, str]]:
    return {(d.path, d.code) for d in found}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("5", {("env_file", "E203")}),
        ("[]", {("env_file", "E205")}),
        ('""', {("env_file", "E205")}),
        ("{path: a}", {("env_file", "E203")}),
        ("[{path: one.env, format: raw}]", {("env_file[0].format", "E201")}),
        ("[{required: false}]", {("env_file[0]", "E202")}),
        ("[{path: one.env, required: maybe}]", {("env_file[0].required", "E203")}),
    ],
)
def test_shapes(files: str, told: set[tuple[str, str]], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "one.env").write_text("KEY=x\n")
    assert _paths(refused(MANIFEST.format(files=files), {"KEY": "k"})) == told


def test_no_env_file_no_import(tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_text("name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n")
    code = (
        "import sys; from pathlib import Path; from runner.manifest.load import load_manifest\n"
        "load_manifest(Path(sys.argv[1]), {}); sys.exit('dotenv' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60, env={"PYTHONPATH": root})
