import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.main import COMMANDS, main
from runner.cli.text import format_age, format_bytes


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"mlx-run {command}" in shown
    assert "example:" in shown
    assert COMMANDS[command] in shown


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["aply", "dev.yaml"])
    assert exit_.value.code == 64
    assert "did you mean 'apply'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "a.yaml", "--no-such"], ["wait", "--for", "joy"], ["schema", "x"]]
)
def test_a_wrong_command_line_has_an_exit_code_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 64
    shown = capsys.readouterr()
    assert "error: " in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dev.yaml"], "did you mean `mlx-run apply dev.yaml`?"),
        (["-f", "dev.yaml"], "there is no command; write one behind the files, such as mlx-run -f dev.yaml apply"),
        (["diff", "x"], "'x' is not the number of a generation; `mlx-run history` shows them"),
        (["rollback", "two"], "'two' is not the number of a generation; `mlx-run history` shows them"),
        (["down", "-t", "soon"], "'soon' is not a duration, such as 30s"),
        (["logs", "--tail", "-5"], "'-5' is not a whole number, such as 20"),
        (["models", "--limit", "x"], "'x' is not a whole number, such as 20"),
    ],
)
def test_a_wrong_word_is_told_with_the_right_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 64
    assert said in capsys.readouterr().err


def test_words_and_options_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dev.yaml").write_text("name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n")
    assert main(["service", "install", "--print", str(tmp_path / "dev.yaml")]) == 0
    assert "dev.yaml" in capsys.readouterr().out


def _run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-P", "-m", "runner.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False, timeout=60)


def test_a_terminal_without_utf_8_gets_escapes(tmp_path: Path) -> None:
    file = tmp_path / "mänifest.yaml"
    file.write_text("name: dev\n")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    told = _run("validate", str(file), **ascii_only)
    assert told.returncode == 1
    assert file.name.encode() in told.stderr  # a name's bytes are what they are
    helped = _run("bench", "--help", **ascii_only)
    assert helped.returncode == 0
    assert rb"N,N,\u2026" in helped.stdout


def test_a_closed_output_is_none() -> None:
    shell = f'"{sys.executable}" -P -m runner.cli.main schema >&-'
    told = subprocess.run(["/bin/sh", "-c", shell], stderr=subprocess.PIPE, check=False, timeout=60)
    assert (told.returncode, told.stderr) == (0, b"")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlx-run 0.")


@pytest.mark.parametrize("command", ["apply", "plan", "validate"])
def test_a_file_that_is_not_there(command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([command, str(tmp_path / "none.yaml")]) == 1
    shown = capfd.readouterr().err
    assert "none.yaml" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("arguments", [["status"], ["down"], ["chat"], ["logs"], ["status", "nobody"]])
def test_without_a_runner(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path))
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "mlx-run apply MANIFEST" in shown


def test_a_wrong_setting_is_named(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MLX_RUN_DRAIN_TIMEOUT", "soon")
    assert main(["apply", str(tmp_path / "dev.yaml")]) == 1
    assert "MLX_RUN_DRAIN_TIMEOUT" in capfd.readouterr().err


def test_status_imports_neither_pydantic_nor_an_http_server() -> None:
    code = (
        "import sys; from runner.cli.main import main; main(['status'])\n"
        "heavy = {'pydantic', 'yaml', 'falcon', 'granian', 'asyncio', 'rich', 'msgspec', 'psutil'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


def test_the_runner_imports_neither_pydantic_nor_yaml() -> None:
    code = (
        "import sys, runner.cli.apply, runner.cli.applying, runner.control.runner, falcon.asgi\n"
        "heavy = {'pydantic', 'yaml', 'rich', 'mlx', 'psutil', 'prometheus_client'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (59, "59s"), (61, "1m 1s"), (3700, "1h 1m"), (90000, "1d 1h")]
)
def test_ages(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("buffered", [["-u"], []])
def test_a_full_disk_is_said_without_a_traceback(buffered: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, *buffered, "-m", "runner.cli.main", "explain", "E101"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device\nMake room. State is kept in ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("status",), ("logs", "--name"), ("history",), ("down",)])
def test_a_name_that_no_file_can_have_is_said_without_a_traceback(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert main([*words, "x" * 300]) == 1
    assert capsys.readouterr().err.startswith("error: File name too long: ")
