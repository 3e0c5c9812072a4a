"""`mlx-run init`, asked and unasked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.inspect.folders import write_llama
from tests.plan.folders import hub_snapshot
from tests.stories.harness import MODELS, until

COMMIT = "0123456789" * 4
"""A number, by YAML's lights."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and a hub cache beside it with two models."""
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    write_llama(hub_snapshot(hub, "org/Small-4bit", {}, commit=COMMIT))
    write_llama(hub_snapshot(hub, "org/Larger-4bit", {}, commit=COMMIT), num_hidden_layers=4)
    folder = tmp_path / "My Project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def init(*arguments: str, typed: str = "") -> tuple[int, str]:
    """The command at a terminal of its own: its exit code, and what the terminal shows."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "runner.cli.main", "init", *arguments], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # how Linux says that a terminal has nobody left
            data = b""
        if not data:
            break
        shown += data
    os.close(ours)
    return process.wait(), shown.decode()


def test_what_fits_best_is_taken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--yes", "--port", "8765"]) == 0
    assert "mlx-run.yaml: org/Larger-4bit on port 8765." in capsys.readouterr().out
    text = (home / "mlx-run.yaml").read_text()
    assert "name: my-project\n" in text
    assert f'    revision: "{COMMIT}" ' in text
    assert "  # small:\n  #   source: org/Small-4bit " in text
    assert main(["validate", "--strict", "mlx-run.yaml"]) == 0


def test_nothing_is_overwritten_unasked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mlx-run.yaml").write_text("mine")
    assert main(["init", "--yes"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (home / "mlx-run.yaml").read_text() == "mine"
    assert main(["init", "--yes", "--force"]) == 0
    assert (home / "mlx-run.yaml").read_text() != "mine"
    assert files(home) == ["mlx-run.yaml"]


def test_a_terminal_is_asked(home: Path) -> None:
    code, shown = init("it.yaml", typed="7\n2 1\nport\n8766\ny\n")
    assert code == 0, shown
    assert "There is no number 7." in shown
    assert "'port' is not a port" in shown
    assert "export MLX_RUN_API_KEY=" in shown
    text = (home / "it.yaml").read_text()
    assert text.index("source: org/Small-4bit") < text.index("source: org/Larger-4bit")
    assert "host: 0.0.0.0" in text
    assert "port: 8766" in text


def test_the_end_of_input_writes_nothing(home: Path) -> None:
    code, shown = init(typed="\x04")
    assert (code, files(home)) == (1, [])
    assert "nothing was written" in shown


def test_nobody_to_ask(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["init"]) == 64
    assert "--yes" in capsys.readouterr().err
    assert files(home) == []


def test_without_a_cache_there_is_something_to_download(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "none"))
    assert main(["init", "--yes"]) == 0
    assert "is downloaded by the first apply" in capsys.readouterr().out
    assert main(["validate", "mlx-run.yaml"]) == 0


def test_a_folder_is_written_as_the_file_sees_it(home: Path) -> None:
    write_llama(home / "models" / "mine")
    (home / "sub").mkdir()
    assert main(["init", "--yes", "--model", "models/mine", "a.yaml"]) == 0
    assert "source: ./models/mine " in (home / "a.yaml").read_text()
    assert main(["init", "--yes", "--model", "models/mine", "sub/b.yaml"]) == 0
    assert str(home.resolve() / "models" / "mine") in (home / "sub" / "b.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nowhere"], "models.nowhere.source"),
        (["--model", "org/Huge"], "org/Huge does not fit: its weights take"),
        (["--model", "org/Odd"], "org/Odd cannot be served: quantised by awq"),
        (["no/such/folder.yaml"], "there is no folder no/such"),
        (["--name", "Not A Name"], "a.yaml:"),
    ],
)
def test_what_cannot_be(
    home: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_llama(hub_snapshot(tmp_path / "hub", "org/Huge", {}), num_hidden_layers=90, hidden_size=65536)
    odd = write_llama(hub_snapshot(tmp_path / "hub", "org/Odd", {}))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    file = [] if arguments[0].endswith(".yaml") else ["a.yaml"]
    assert main(["init", "--yes", *file, *arguments]) == 1
    assert said in capsys.readouterr().err
    assert files(home) == []


@pytest.mark.nightly
@pytest.mark.story
@pytest.mark.mlx
def test_what_it_writes_serves(home: Path, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "demo-chat", hub_snapshot(tmp_path / "hub", "org/demo-bf16", {}), dirs_exist_ok=True)
    environment = {**os.environ, "MLX_RUN_STATE_DIR": str(tmp_path / "state"), "MLX_RUN_ORPHAN_GRACE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runner.cli.main", *arguments], env=environment, capture_output=True, text=True
        )

    assert run("init", "--yes").returncode == 0
    started = run("apply", "mlx-run.yaml", "--detach")
    assert started.returncode == 0, started.stderr
    try:
        answer = run("chat", "demo", "--message", "What is 17 + 25?")
        assert "42" in answer.stdout, answer.stderr
    finally:
        assert run("down").returncode == 0
        until(lambda: run("status").returncode == 1)
