"""`mlx-run completion`: a script with which a shell completes commands, options, runners and models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Final

from runner.cli.grammar import Command, command_of
from runner.cli.locate import runners_up
from runner.cli.main import COMMANDS, load_command
from runner.cli.shells import bash, fish, zsh
from runner.control import client
from runner.errors import UsageError

_SHELLS: Final[dict[str, Callable[[Sequence[Command]], str]]] = {"bash": bash, "zsh": zsh, "fish": fish}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("shell", nargs="?", choices=_SHELLS, help="which shell")
    parser.add_argument("--words", choices=_WORDS, help=argparse.SUPPRESS)  # what the scripts ask when they run
    parser.epilog = (
        "Shells load these files when they need them:\n"
        "  bash: mlx-run completion bash > ~/.local/share/bash-completion/completions/mlx-run\n"
        "  zsh:  mlx-run completion zsh > ~/.zfunc/_mlx-run    with fpath+=(~/.zfunc) before compinit in ~/.zshrc\n"
        "  fish: mlx-run completion fish > ~/.config/fish/completions/mlx-run.fish\n\n"
        "In bash without bash-completion, source the file in ~/.bashrc.\n\n"
        "example:\n  mlx-run completion bash"
    )


def run(arguments: argparse.Namespace) -> int:
    """0. Raises UsageError without a shell."""
    if arguments.words:
        print("\n".join(_WORDS[arguments.words]()))
        return 0
    if arguments.shell is None:
        raise UsageError("which shell?", hint=f"Say one of {', '.join(_SHELLS)}.")
    commands = [command_of(name, summary, load_command(name)[1]) for name, summary in COMMANDS.items()]
    print(_SHELLS[arguments.shell](commands), end="")
    return 0


def _runners() -> list[str]:
    return [folder.name for folder in runners_up()]


def _models() -> list[str]:
    return [m["name"] for f in runners_up() for m in client.request(f.control_socket, "status")["models"]]


def _codes() -> list[str]:
    from runner.manifest.codes import registry  # noqa: PLC0415 - the others answer within a key press without it

    return list(registry())


_WORDS: Final[dict[str, Callable[[], list[str]]]] = {"runners": _runners, "models": _models, "codes": _codes}
"""What changes, by the kinds of `runner.cli.grammar`."""
