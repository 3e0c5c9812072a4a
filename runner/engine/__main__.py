"""`python -m runner.engine --spec PATH.json --socket PATH.sock`: one engine process. Started by the runner."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path

import msgspec

from runner.engine import environment
from runner.engine.process import EngineProcess, read_spec
from runner.engine.transport import Transport
from runner.telemetry import configure_logging

logger = logging.getLogger("runner.engine")


def main() -> int:
    """Serve until told to stop; returns the exit code: EngineProcess's, or 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m runner.engine", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="JSON of protocol.EngineSpec")
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
    arguments = parser.parse_args()
    started = environment.restart_if_needed(time.monotonic())
    configure_logging("info")
    # A Ctrl-C goes to the whole process group: what becomes of the engines is the runner's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spec = read_spec(arguments.spec)
        transport = Transport(arguments.socket)
    except (OSError, msgspec.DecodeError) as error:
        logger.error("engine cannot start", extra={"reason": str(error)})
        return 2
    return EngineProcess(spec, transport, started).run()


if __name__ == "__main__":
    sys.exit(main())
