"""`mlx-run adopt`: write into the manifest what the admin API changed."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from runner.cli.locate import add_files, add_name, find, wanted
from runner.control import client
from runner.control.atomic import write_atomically
from runner.control.who import this_user
from runner.errors import RunnerError
from runner.manifest.adopt import Adopted, adopt
from runner.manifest.drift import from_json, lines


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    parser.epilog = (
        "Comments, order and everything else in the file stay as they are. What is written is read back first: unless\n"
        "it comes to exactly what runs, nothing is written. Without this, the next apply, or edit, reverts what the\n"
        "admin API changed.\n\n"
        "example:\n  mlx-run adopt --dry-run\n  mlx-run adopt"
    )


def run(arguments: argparse.Namespace) -> int:
    """0, also when there is nothing to write. Raises ManifestError and RunnerError; then nothing was."""
    folder = find(wanted(arguments))
    status = client.request(folder.control_socket, "status")
    if status["changes"] is None:
        print(f"{folder.name}: nothing to adopt, the admin API has changed nothing since the last apply.")
        return 0
    changes = from_json(status["changes"])
    paths = [Path(path) for path in status["manifests"]]
    adopted = adopt(paths, os.environ, changes)
    for file in adopted:
        print("".join(_diff(file)), end="")
    if arguments.dry_run:
        return 0
    _write(adopted)
    # Nothing is to be done, and the runner knows by that. It may have looked already.
    client.request(
        folder.control_socket,
        "apply",
        timeout=None,
        manifests=status["manifests"],
        watch=status["watching"],
        user=this_user(),
    )
    print(f"Adopted: {', '.join(lines(changes))}.")
    return 0


def _diff(file: Adopted) -> Sequence[str]:
    before, after = (text.splitlines(keepends=True) for text in (file.before, file.after))
    return [
        line if line.endswith("\n") else line + "\n"
        for line in difflib.unified_diff(before, after, str(file.path), str(file.path))
    ]


def _write(adopted: Sequence[Adopted]) -> None:
    """Every file, or none. Raises RunnerError."""
    written: list[tuple[Path, bytes, int]] = []
    try:
        for file in adopted:
            path = file.path.resolve()  # what a link points to is the file
            content, mode = path.read_bytes(), path.stat().st_mode & 0o777
            if content.decode("utf-8-sig") != file.before:
                raise RunnerError(f"{path} was edited meanwhile", hint="Run `mlx-run adopt` again.")
            mark = b"\xef\xbb\xbf" if content.startswith(b"\xef\xbb\xbf") else b""
            written.append((path, content, mode))
            write_atomically(path, mark + file.after.encode(), mode=mode)
    except (OSError, RunnerError) as error:
        for path, content, mode in written:
            write_atomically(path, content, mode=mode)
        if isinstance(error, OSError):
            hint = "Nothing was changed."
            raise RunnerError(f"{error.filename} cannot be written: {error.strerror}", hint=hint) from None
        raise
