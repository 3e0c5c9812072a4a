"""What `mlx-run apply` does with a manifest: becomes its runner, starts one that stays, or tells the one that is up."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.cli.giving_up import GivingUp, held_back
from runner.cli.result import JsonView
from runner.cli.view import View
from runner.control import client
from runner.control.compiled import Compiled
from runner.control.compiler import Compiler
from runner.control.state_folder import StateFolder
from runner.control.who import this_user
from runner.errors import AlreadyRunning, NotRunning, RunnerError
from runner.options import Options
from runner.processes import python_module
from runner.telemetry import configure_logging

logger = logging.getLogger(__name__)

_SPAWN_DEADLINE = 15.0
"""Seconds a detached runner gets to open its control socket."""

_LAST_WORDS = 5.0
"""Seconds that one which stopped answering gets to end."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for on the command line. `timeout` in seconds, None for none; `wait` matters with `detach` only."""

    paths: tuple[Path, ...]
    detach: bool = False
    wait: bool = True
    timeout: float | None = None
    target: tuple[str, ...] = ()
    prune: bool = True
    json: bool = False
    watch: bool = True
    generation: int | None = None
    frozen: bool = False

    def request(self) -> dict[str, Any]:
        """As the runner that is up gets it."""
        return {
            "manifests": [str(path) for path in self.paths],
            "target": list(self.target),
            "prune": self.prune,
            "timeout_seconds": self.timeout,
            "watch": self.watch,
            "frozen": self.frozen,
            "generation": self.generation,
            "user": this_user(),
        }

    def command_line(self) -> list[str]:
        """As a runner that is started gets it."""
        words = [word for path in self.paths for word in ("--file", str(path))]
        words += [word for target in self.target for word in ("--target", target)]
        words += [] if self.prune else ["--prune=false"]
        words += ["--frozen"] if self.frozen else []
        words += [] if self.timeout is None else [f"--timeout={self.timeout:f}"]
        return words if self.watch else [*words, "--no-watch"]


def apply(wish: Wish, compiler: Compiler, began: float) -> int:
    """Returns 0; `began` is when the command did. Raises ManifestError and whatever else kept it from being so."""
    with JsonView(began) if wish.json else View(wish.paths, began, watch=wish.watch) as view:
        return _apply(wish, compiler, view)


def _apply(wish: Wish, compiler: Compiler, view: View | JsonView) -> int:
    if not wish.detach:
        # While the manifest is being read, and only where this process may need it: 100 ms of imports.
        import_module("runner.control.runner")
    compiled = compiler.compile(wish.paths, frozen=wish.frozen)
    error = compiled.error()
    if compiled.options is None or (error is not None and compiled.missing is None):
        assert error is not None, "a manifest without options is wrong"
        raise error
    folder = StateFolder(compiled.options.state_dir, compiled.name)
    if client.is_up(folder.control_socket):
        return _hand_over(folder, wish, view)
    if wish.generation is not None:
        raise NotRunning(f"no runner named {folder.name!r} is up, so no generation is current", hint=_NO_GENERATION)
    if wish.detach:
        return _detach(folder, wish, view)
    try:
        return _become_runner(compiled, compiled.options, compiler, wish, view)
    except AlreadyRunning:
        # Somebody else was faster: it is theirs now, and this is for them to do.
        _until_up(folder)
        return _hand_over(folder, wish, view)


_NO_GENERATION = "Leave --generation out to start one."


def _hand_over(folder: StateFolder, wish: Wish, view: View | JsonView) -> int:
    attempt = secrets.token_hex(8)
    says = "Undoing it, what ran goes on. Ctrl-C again leaves that to the runner."
    with GivingUp(folder.control_socket, "give_up", says, attempt=attempt):
        return _follow(folder, "apply", wish, view, attempt=attempt, **wish.request())


def _follow(folder: StateFolder, op: str, wish: Wish, view: View | JsonView, **fields: Any) -> int:
    """Show what a runner does until it is done with it, or has said what it will do where nobody waits."""
    replies = client.stream(folder.control_socket, op, **fields)
    with contextlib.closing(replies):
        for reply in replies:
            view.show(reply)
            if not wish.wait and reply.get("event") == "planned":
                if isinstance(view, JsonView):
                    view.left()
                break
    view.summary(folder.name)
    return 0


def _become_runner(compiled: Compiled, options: Options, compiler: Compiler, wish: Wish, view: View | JsonView) -> int:
    from runner.control.runner import raise_for, run  # noqa: PLC0415 - handing over and detaching need no HTTP server
    from runner.plan.scope import Scope  # noqa: PLC0415

    # Line buffered, so that `mlx-run logs -f` follows.
    log = StateFolder(options.state_dir, compiled.name).log.open("a", buffering=1, encoding="utf-8")
    try:
        configure_logging(options.log_level, stream=log)
        scope = Scope(wish.target, wish.prune)
        result = run(
            compiled,
            options,
            compiler,
            partial(_show, view),
            watch=wish.watch,
            scope=scope,
            timeout=wish.timeout,
            frozen=wish.frozen,
        )
    finally:
        with contextlib.suppress(OSError):  # on a full disk, what matters is how it ended
            log.close()
    raise_for(result)
    return 0


def _show(view: View | JsonView, event: dict[str, Any]) -> None:
    """Show an event to whoever reads, if anybody does: a pager that is closed, or a disk that is full, is no reason to
    serve no more. The runner's log has it all."""
    try:
        view.show(event)
    except OSError as error:
        logger.warning("what happens is not printed any more", extra={"error": str(error)})
        # Also for what is buffered, which the interpreter would write, and complain of, as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _detach(folder: StateFolder, wish: Wish, view: View | JsonView) -> int:
    """Start a runner that outlives this terminal, and wait until it has settled."""
    process: subprocess.Popen[bytes] | None = None
    says = "Stopping the runner again. Ctrl-C once more leaves that to itself."
    with contextlib.ExitStack() as asked:
        try:
            with held_back():  # or it could be there, and nobody know of it
                process = _spawn(folder, wish)
            _until_up(folder, process)
            asked.enter_context(GivingUp(folder.control_socket, "down", says, drain=0))
        except KeyboardInterrupt:
            if process is not None:
                process.terminate()  # it has not answered yet
            raise
        try:
            return _follow(folder, "follow", wish, view)
        except NotRunning:  # it failed, maybe before it could say so here; its last words are in the log
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(timeout=_LAST_WORDS) and (reason := _last_words(folder)):
                    raise NotRunning(reason) from None
            raise


def _spawn(folder: StateFolder, wish: Wish) -> subprocess.Popen[bytes]:
    with folder.start_log.open("wb") as log:
        return subprocess.Popen(
            python_module("runner.cli.main", "apply", *wish.command_line()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def _until_up(folder: StateFolder, process: subprocess.Popen[bytes] | None = None) -> None:
    """Returns once the runner answers. Raises NotRunning where `process`, which is to be it, ends first."""
    deadline = time.monotonic() + _SPAWN_DEADLINE
    while not client.is_up(folder.control_socket):
        if process is None:
            time.sleep(0.05)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                raise NotRunning(_last_words(folder) or f"the runner exited with code {code}; see {folder.log}")
        if time.monotonic() > deadline:
            raise RunnerError("the runner did not start in time", hint=f"See {folder.log}.")


def _last_words(folder: StateFolder) -> str:
    """What a runner that did not come up wrote, empty where it wrote nothing."""
    return folder.start_log.read_text(errors="replace").strip().removeprefix("error: ")
