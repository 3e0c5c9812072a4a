"""What `mlx-run apply` does with a manifest: becomes its runner, starts one that stays, or tells the one that is up."""

from __future__ import annotations

import contextlib
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.cli.view import View
from runner.control import client
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.state_folder import StateFolder
from runner.errors import NotRunning, RunnerError
from runner.options import Options
from runner.processes import python_module
from runner.telemetry import configure_logging

_SPAWN_DEADLINE = 15.0
"""Seconds a detached runner gets to open its control socket."""


def apply(path: Path, compiler: Compiler, began: float, *, detach: bool) -> int:
    """Returns 0; `began` is when the command did. Raises ManifestError and whatever else kept it from being so."""
    if not detach:
        # While the manifest is being read, and only where this process may need it: 100 ms of imports.
        import_module("runner.control.runner")
    compiled = compiler.compile(path)
    error = compiled.error()
    if compiled.options is None or (error is not None and compiled.missing is None):
        assert error is not None, "a manifest without options is wrong"
        raise error
    folder = StateFolder(compiled.options.state_dir, compiled.name)
    view = View(path, began)
    if client.is_up(folder.control_socket):
        return _follow(folder, "apply", view, manifest=str(path))
    if detach:
        return _detach(folder, path, view)
    return _become_runner(compiled, compiled.options, compiler, view)


def _follow(folder: StateFolder, op: str, view: View, **fields: Any) -> int:
    """Show what a runner does until it is done with it."""
    with view:
        for reply in client.stream(folder.control_socket, op, **fields):
            view.show(reply)
    view.summary(folder.name)
    return 0


def _become_runner(compiled: Compiled, options: Options, compiler: Compiler, view: View) -> int:
    from runner.control.runner import raise_for, run  # noqa: PLC0415 - handing over and detaching need no HTTP server

    # Line buffered, so that `mlx-run logs -f` follows.
    with StateFolder(options.state_dir, compiled.name).log.open("a", buffering=1, encoding="utf-8") as log, view:
        configure_logging(options.log_level, stream=log)
        result = run(compiled, options, compiler, view.show)
    raise_for(result)
    return 0


def _detach(folder: StateFolder, path: Path, view: View) -> int:
    """Start a runner that outlives this terminal, and wait until it has settled."""
    with folder.start_log.open("wb") as log:
        process = subprocess.Popen(
            python_module("runner.cli.main", "apply", str(path)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _SPAWN_DEADLINE
    while not client.is_up(folder.control_socket):
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.05)
            reason = folder.start_log.read_text(errors="replace").strip().removeprefix("error: ")
            raise NotRunning(reason or f"the runner exited with code {code}; see {folder.log}")
        if time.monotonic() > deadline:
            raise RunnerError("the runner did not start in time", hint=f"See {folder.log}.")
    return _follow(folder, "follow", view)
