"""`mlx-run`: picks the command, runs it, and turns errors into a line that says what to do.

argparse rather than a framework: `mlx-run apply` has 250 ms from its start to the first answer on /health, and typer
would take 50 of them. Each command is a module with `configure(parser)` and `run(arguments)`; only the one that is
asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from runner.errors import ManifestError, MlxRunError

COMMANDS: Final = {
    "apply": "Make it so: start or change what a manifest declares",
    "plan": "Show what apply would do",
    "validate": "Check a manifest",
    "explain": "Explain the code of a message",
    "status": "Show what is running",
    "events": "Show what happened",
    "wait": "Wait until models are ready",
    "chat": "Talk to a model",
    "logs": "Show what the runner or a model's engine logged",
    "down": "Drain and stop a runner",
    "schema": "Print the manifest's JSON schema",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _top_level(arguments)
    command = importlib.import_module(f"runner.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"mlx-run {name}",
        description=f"{COMMANDS[name]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.configure(parser)
    try:
        code: int = command.run(parser.parse_args(arguments[1:]))
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
    return code


def _top_level(arguments: list[str]) -> int:
    commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mlx-run",
        usage="mlx-run COMMAND [OPTIONS]",
        description="Serve local MLX models from a YAML manifest.",
        epilog=f"commands:\n{commands}\n\nexample:\n  mlx-run apply configs/dev.yaml\n\n"
        "`mlx-run COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
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
    import difflib  # noqa: PLC0415 - only a mistyped command pays for it

    close = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
