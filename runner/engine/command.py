"""The engine's command line: arguments, spec, socket; then the process."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from runner.engine.oom import be_first, enter
from runner.engine.process import EngineProcess, read_spec
from runner.engine.transport import Transport
from runner.telemetry import configure_logging

logger = logging.getLogger(__name__)


def serve(arguments: Sequence[str], started: float, cores: int | None = None) -> int:
    """Serve until told to stop; returns the exit code: EngineProcess's, or 2 for wrong arguments.

    `started` is when the process began, by `time.monotonic`. It has `cores`, None for all that it may run on.
    """
    parser = argparse.ArgumentParser(prog="python -m runner.engine", description="One engine process, for one model.")
    parser.add_argument("--spec", type=Path, required=True, help="JSON of protocol.EngineSpec")
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
    given = parser.parse_args(arguments)
    configure_logging("info")
    # A Ctrl-C goes to the whole process group: what becomes of the engines is the runner's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    be_first()
    try:
        spec = read_spec(given.spec)
        enter(spec.control_group)
        _hold(Path(spec.path))
        transport = Transport(given.socket)
    except (OSError, msgspec.DecodeError) as error:
        logger.error("engine cannot start", extra={"reason": str(error)})
        return 2
    return EngineProcess(spec, transport, started, cores).run()


def _hold(folder: Path) -> None:
    """Lock the model's folder, shared, for as long as this process lives: `models prune` removes nothing that is in use
    (`runner.control.copies`). Without it, on a file system that has no locks, all the rest goes on."""
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
