import json
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.manifest.schema import SCHEMA_FILE


def test_prints_what_the_repository_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["title"] == "mlx-run manifest"
    assert shown == SCHEMA_FILE.read_text(encoding="utf-8")


def test_prints_that_of_overlays(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--overlay"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["title"], "required" in shown) == ("mlx-run overlay", False)


def test_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["properties"]["models"]


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--output", str(tmp_path / "none" / "s.json")]) == 1
    assert "s.json: No such file or directory" in capsys.readouterr().err
