"""What a command is about: the files of a manifest, and the runner of that name, of those files, or the only one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from runner.control import client
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError, NotRunning, RunnerError, UsageError
from runner.options import state_dir

FILE_OPTIONS: Final = ("-f", "--file")


def add_manifest(parser: argparse.ArgumentParser) -> None:
    """The files that a command reads: one FILE, or any number of `-f FILE`, which are merged."""
    parser.add_argument("files", nargs="*", metavar="FILE", action=_Files, help="a manifest")
    parser.add_argument(*FILE_OPTIONS, dest="files", metavar="FILE", action=_Files, help=_MERGED)


def add_name(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """What names a runner: its name, or its manifest's files."""
    which = "(default: the only one that is up)"
    if positional:
        parser.add_argument("name", nargs="?", help=f"a runner's name {which}")
    else:
        parser.add_argument("-n", "--name", help=f"the runner's name, from its manifest {which}")


def add_files(
    parser: argparse.ArgumentParser,
    *,
    short: bool = True,
    about: str = "the runner of this manifest",
) -> None:
    """`-f FILE` in place of a runner's name; without `short` where `-f` is to follow."""
    options = FILE_OPTIONS if short else FILE_OPTIONS[1:]
    parser.add_argument(*options, dest="files", metavar="FILE", action=_Files, help=about)


_MERGED: Final = "a manifest, or an overlay over those before it; may be given several times"


class _Files(argparse.Action):
    """Collects files in the order of the command line, whether they follow an option or not."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = [values] if option else list(values)
        if len(given) > 1:
            merged = " ".join(f"-f {name}" for name in given)
            parser.error(f"{len(given)} files; write {merged} to merge them into one manifest")
        namespace.files = [*(getattr(namespace, "files", None) or []), *given]


def manifests(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """The files of `add_manifest` or `add_files`, absolute: another process, in another folder, will find them.

    Symlinks stay as they are. Raises UsageError where there is no file.
    """
    if not arguments.files:
        raise UsageError("no manifest is given", hint="Write its path, such as configs/dev.yaml, or -f FILE.")
    try:
        return tuple(Path(name).absolute() for name in arguments.files)
    except FileNotFoundError:
        raise UsageError("the current folder is gone", hint="Change to one that is there.") from None


def runners_up() -> list[StateFolder]:
    """Every runner that answers, by name."""
    root = state_dir()
    if not root.is_dir():
        return []
    folders = [StateFolder(root, path.name, create=False) for path in sorted(root.iterdir()) if path.is_dir()]
    return [folder for folder in folders if client.is_up(folder.control_socket)]


def known(name: str) -> StateFolder:
    """The state folder of that name, up or not. Raises NotRunning when there never was one."""
    folder = StateFolder(state_dir(), name, create=False)
    if not folder.folder.is_dir():
        file = f"For the runner of that manifest, write -f {name}." if Path(name).is_file() else ""
        raise NotRunning(f"there is no runner named {name!r}", hint=file or _others())
    return folder


def wanted(arguments: argparse.Namespace) -> str | None:
    """The runner's name that the arguments of `add_name` and `add_files` come to; None where they say nothing.

    Raises ManifestError where the files name no runner, and RunnerError where they name another one.
    """
    name: str | None = arguments.name
    if not arguments.files:
        return name
    named = _name_of(manifests(arguments))
    if name and name != named:
        raise RunnerError(f"the manifest is that of {named!r}, not of {name!r}", hint="Give the name or the files.")
    return named


def _name_of(paths: Sequence[Path]) -> str:
    # Imported here: these commands need YAML only for `-f`, and should not wait for it otherwise.
    from runner.manifest.load import manifest_name  # noqa: PLC0415

    try:
        return manifest_name(paths, os.environ)
    except ManifestError:
        for folder in runners_up():  # of a manifest that is being edited, the runner that follows it knows the name
            if client.request(folder.control_socket, "status").get("manifests") == [str(path) for path in paths]:
                return folder.name
        raise


def find(name: str | None) -> StateFolder:
    """The runner of that name, or the only one that is up. Raises NotRunning and RunnerError (which one?)."""
    if name:
        folder = known(name)
        if not client.is_up(folder.control_socket):
            raise NotRunning(f"the runner {name!r} is not up", hint=_others())
        return folder
    up = runners_up()
    if not up:
        raise NotRunning("no runner is up", hint="Start one with `mlx-run apply MANIFEST`.")
    if len(up) > 1:
        raise RunnerError(
            f"{len(up)} runners are up: {', '.join(f.name for f in up)}", hint="Say which with `--name NAME`."
        )
    return up[0]


def find_kept(name: str | None) -> StateFolder:
    """The state folder of that name, or of the only runner that is up, or the only one that there is; its runner need
    not be up. Raises NotRunning and RunnerError (which one?)."""
    if name:
        return known(name)
    up = runners_up()
    if len(up) == 1:
        return up[0]
    root = state_dir()
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not names:
        raise NotRunning("there was no runner yet", hint="Start one with `mlx-run apply MANIFEST`.")
    if len(names) > 1:
        raise RunnerError(f"there are several runners: {', '.join(names)}", hint="Say which.")
    return known(names[0])


def _others() -> str:
    up = [folder.name for folder in runners_up()]
    return f"Up: {', '.join(up)}." if up else "Start one with `mlx-run apply MANIFEST`."
