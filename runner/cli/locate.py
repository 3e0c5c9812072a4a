"""Finds the runner that a command means: by name, by manifest, or the only one that is up."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.control import client
from runner.control.state_folder import StateFolder
from runner.errors import NotRunning, RunnerError
from runner.options import state_dir


def add_name(parser: argparse.ArgumentParser) -> None:
    """The option that names a runner."""
    parser.add_argument("-n", "--name", help="the runner's name, from its manifest (default: the only one that is up)")


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
        raise NotRunning(f"there is no runner named {name!r}", hint=_others())
    return folder


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


def _others() -> str:
    up = [folder.name for folder in runners_up()]
    return f"Up: {', '.join(up)}." if up else "Start one with `mlx-run apply MANIFEST`."


def absolute(path: str) -> Path:
    """A manifest's path as another process, in another folder, will find it; symlinks stay as they are."""
    return Path(path).absolute()
