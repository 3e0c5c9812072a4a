"""Completion scripts, run by the shells that are here."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest

from runner.cli.grammar import Value, command_of
from runner.cli.main import COMMANDS, load_command, main
from tests.control.scene import Scene

MLX_RUN = f'mlx-run() {{ {shlex.quote(sys.executable)} -m runner.cli.main "$@"; }}'


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """All three, printed as users print them."""
    return {shell: printed("completion", shell) for shell in ("bash", "zsh", "fish")}


def printed(*arguments: str) -> str:
    with redirect_stdout(StringIO()) as shown:
        assert main(arguments) == 0
    return shown.getvalue()


def bash(script: str, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    array = " ".join(map(shlex.quote, words))
    lines = [script, MLX_RUN, f"COMP_WORDS=({array})", f"COMP_CWORD={len(words) - 1}", "_mlx_run"]
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join([*lines, 'printf "%s\\n" "${COMPREPLY[@]}"'])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


in_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
in_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")


@in_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pl"], ["plan"]),
        (["-f", "a.yaml", "pl"], ["plan"]),
        (["plan", "--det"], ["--detailed-exitcode"]),
        (["validate", "--format", "s"], ["sarif"]),
        (["validate", "--format", "=", "s"], ["sarif"]),
        (["validate", "--format", "="], ["text", "json", "github", "sarif", "junit"]),
        (["wait", "--for", ""], ["ready", "sync"]),
        (["completion", "z"], ["zsh"]),
        (["explain", "E70"], ["E701", "E702", "E703"]),
        (["plan", "co"], []),  # a file: bash's own completion takes over
        (["-f", ""], []),
        (["nothing", ""], []),
    ],
)
def test_bash(scripts: dict[str, str], words: list[str], offered: list[str]) -> None:
    assert bash(scripts["bash"], "mlx-run", *words) == offered


@in_bash
def test_bash_offers_every_command(scripts: dict[str, str]) -> None:
    assert set(bash(scripts["bash"], "mlx-run", "")) >= set(COMMANDS)


@in_bash
def test_bash_leaves_files_to_its_own_completion(scripts: dict[str, str]) -> None:
    registered = subprocess.run(
        ["bash", "--norc", "-c", f"{scripts['bash']}\ncomplete -p mlx-run"], capture_output=True, text=True, check=True
    )
    assert registered.stdout.strip() == "complete -o default -F _mlx_run mlx-run"


@in_fish
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mlx-run pl", ["plan"]),
        ("mlx-run plan --det", ["--detailed-exitcode"]),
        ("mlx-run validate --format s", ["sarif"]),
        ("mlx-run wait --for ", ["ready", "sync"]),
    ],
)
def test_fish(scripts: dict[str, str], line: str, offered: list[str]) -> None:
    command = f"{scripts['fish']}\ncomplete -C {shlex.quote(line)}"
    done = subprocess.run(["fish", "--no-config", "-c", command], capture_output=True, text=True, check=True)
    assert [shown.split("\t")[0] for shown in done.stdout.splitlines()] == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_parse_and_know_every_option(scripts: dict[str, str], shell: str) -> None:
    script = scripts[shell]
    for name in COMMANDS:
        for action in load_command(name)[1]._actions:
            for flag in action.option_strings if action.help != argparse.SUPPRESS else ():
                spelled = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                assert (spelled if shell == "fish" else flag) in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_a_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 64
    assert "bash, zsh, fish" in capsys.readouterr().err


async def test_runners_and_models_are_those_that_are_up(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["completion", "--words", "runners"]) == 0
    assert await asyncio.to_thread(main, ["completion", "--words", "models"]) == 0
    assert capsys.readouterr().out.split() == ["dev", "chat"]


def test_what_a_parser_takes() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="says  less:\n100%% less")
    parser.add_argument("--style", choices=["a", "b"])
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    command = command_of("it", "It", parser)
    assert command.operand == Value("file", "file")
    assert command.many
    _, quiet, style = command.options
    assert (quiet.flags, quiet.help, quiet.value) == (("-q", "--quiet"), "says less: 100% less", None)
    assert style.value == Value("words", "style", ("a", "b"))
