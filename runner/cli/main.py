"""`mlx-run`: picks the command, runs it, and turns errors into a line that says what to do.

argparse rather than a framework: `mlx-run apply` has 250 ms from its start to the first answer on /health, and typer
would take 50 of them. Each command is a module with `configure(parser)` and `run(arguments)`; only the one that is
asked for is imported.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from runner.errors import ManifestError, MlxRunError, UsageError
from runner.options import state_dir

_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What is wrong with a disk, and not with us."""

_PLACE: Final = (errno.ENAMETOOLONG, errno.ELOOP)
"""What is wrong with a file or a folder that somebody named."""

COMMANDS: Final = {
    "init": "Write a first manifest for this machine",
    "apply": "Make it so: start or change what a manifest declares",
    "plan": "Show what apply would do",
    "pull": "Download what a manifest needs, or one repository",
    "models": "Show models that are here or on the hub, and make room",
    "lock": "Pin each source to a commit and its files' digests",
    "validate": "Check a manifest",
    "fit": "Show what models take in memory, and how much fits",
    "explain": "Explain the code of a message",
    "status": "Show what is running",
    "history": "Show what was applied, and by whom",
    "diff": "Show what differs between two generations",
    "rollback": "Go back to an earlier generation",
    "adopt": "Write into the manifest what the admin API changed",
    "events": "Show what happened",
    "wait": "Wait until models are ready",
    "chat": "Talk to a model",
    "bench": "Measure a server with streaming clients",
    "logs": "Show what the runner or a model's engine logged",
    "down": "Drain and stop a runner",
    "service": "Keep a runner up from login to login, by systemd or launchd",
    "schema": "Print the manifest's JSON schema",
    "completion": "Print a script that completes commands in a shell",
}


_ESCAPE: Final = "mlx-run-escape"
_NOT_OURS: Final = (errno.EACCES, errno.EPERM)
"""What a file that is not for us to read or write fails with."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse would ask `shutil` how wide the terminal is, whenever an option is added: a tenth of a quick command."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)


def _width() -> int:
    """Columns of the terminal, 80 where there is none."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 80


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2 after a wrong command line, which to CI means that a plan has changes.

    `mixed`: of a command (`MIXED`) whose words of several kinds may have options between them.
    """

    mixed = False

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What a command line says."""
        return self.parse_intermixed_args(arguments) if self.mixed else self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    _prepare_output()
    # Packages beside ours may hook into pydantic (logfire does), which doubles the time of a quick command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    arguments = _files_last(list(sys.argv[1:] if argv is None else argv))
    try:
        try:
            code = _run(arguments)
        finally:
            sys.stdout.flush()  # here, where it is known what to say when that fails
    except ManifestError as error:
        from runner.manifest.report import render_diagnostics  # noqa: PLC0415 - only a wrong manifest pays for it

        print(render_diagnostics(error.diagnostics), file=sys.stderr)
        return error.exit_code
    except MlxRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        said = _told(error)
        if not said:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 1
    return code


def _told(error: OSError) -> str:
    """What a file that cannot be read or written means to a user; empty where it is for us to look into."""
    if error.errno in _NOT_OURS and error.filename is not None:
        return f"{error.filename}: {error.strerror}\nIts owner has to allow it, or choose another place."
    if error.errno in _PLACE:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if error.errno in _DISK:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it may be our own output that has no room
        said = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        return f"{said}\nMake room. State is kept in {state_dir()} (MLX_RUN_STATE_DIR)."
    return ""


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _top_level(arguments)
    command, parser = load_command(name)
    code: int = command.run(parser.parse(arguments[1:]))
    return code


def _prepare_output() -> None:
    """Whatever is printed can be written: a terminal without UTF-8 gets escapes, and a closed output is none."""
    codecs.register_error(_ESCAPE, _escaped)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    """An error handler for encoding: bytes of file names that were no text stay what they are, the rest is escaped."""
    assert isinstance(error, UnicodeEncodeError), "it is for what is written"
    refused = error.object[error.start : error.end]
    kept = (c.encode("ascii", "surrogateescape" if "\udc80" <= c <= "\udcff" else "backslashreplace") for c in refused)
    return b"".join(kept), error.end


def load_command(name: str) -> tuple[Any, _Parser]:
    """One of COMMANDS: its module, and a parser with its options."""
    command = importlib.import_module(f"runner.cli.{name}")
    parser = _Parser(
        prog=f"mlx-run {name}",
        description=f"{COMMANDS[name]}.",
        formatter_class=_Help,
    )
    command.configure(parser)
    parser.mixed = getattr(command, "MIXED", False)
    return command, parser


def _files_last(arguments: list[str]) -> list[str]:
    """`-f FILE COMMAND`, as Compose has it, as `COMMAND --file FILE`."""
    files: list[str] = []
    rest = list(arguments)
    while rest and (rest[0].startswith("-f") or rest[0] == "--file" or rest[0].startswith("--file=")):
        option = rest.pop(0)
        if option in ("-f", "--file"):
            if not rest:
                return arguments
            files += ["--file", rest.pop(0)]
        else:
            files += ["--file", option.removeprefix("--file=").removeprefix("-f")]
    return [*rest[:1], *files, *rest[1:]] if rest else arguments


def _top_level(arguments: list[str]) -> int:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    parser = _Parser(
        prog="mlx-run",
        usage="mlx-run [-f FILE]... COMMAND [OPTIONS]",
        description="Serve local MLX models from a YAML manifest.",
        epilog=f"commands:\n{commands}\n\nexample:\n  mlx-run apply configs/dev.yaml\n\n"
        "`mlx-run COMMAND --help` explains a command.\n"
        "exit codes: 0 done, 1 failed, 64 wrong command line, 130 Ctrl-C; of plan --detailed-exitcode also 2 changes,\n"
        "of status also 3 not all is well.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    if arguments[:1] and (arguments[0] == "--file" or arguments[0].startswith(("-f", "--file="))):
        parser.error(f"there is no command; write one behind the files, such as mlx-run {' '.join(arguments)} apply")
    parsed, _ = parser.parse_known_args(arguments)
    if parsed.version:
        from importlib.metadata import version  # noqa: PLC0415 - only `--version` pays for it

        print(f"mlx-run {version('mlx-run')}")
        return 0
    if parsed.command:
        parser.error(f"{parsed.command!r} is not a command; {_suggest(parsed.command)}")
    parser.print_help()
    return 0


def _suggest(word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"did you mean `mlx-run apply {word}`?"
    import difflib  # noqa: PLC0415 - only a mistyped command pays for it

    close = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
