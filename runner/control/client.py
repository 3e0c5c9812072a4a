"""The other end of the control socket. Standard library only: `mlx-run status` should not wait for imports."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

from runner.errors import ControlError, Diagnostic, ManifestError, MlxRunError, NotRunning


def is_up(path: Path) -> bool:
    """Whether a runner answers on this socket."""
    try:
        _connect(path, timeout=2.0).close()
    except NotRunning:
        return False
    return True


def request(path: Path, op: str, *, timeout: float | None = 10.0, **fields: Any) -> dict[str, Any]:
    """The last line of the answer. Raises NotRunning, ControlError, ManifestError."""
    *_, last = stream(path, op, timeout=timeout, **fields)
    return last


def stream(
    path: Path, op: str, *, timeout: float | None = None, **fields: Any
) -> Generator[dict[str, Any], None, None]:
    """Each line of the answer as it comes. `timeout` is seconds between lines.

    Raises NotRunning (nobody there, or it went away), ControlError, ManifestError.
    """
    with _connect(path, timeout=timeout) as connection, connection.makefile("rb") as lines:
        finished = False
        try:
            connection.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            for line in lines:
                reply: dict[str, Any] = json.loads(line)
                if "error" in reply and "event" not in reply:
                    raise _error(reply["error"])
                finished = bool(reply.get("done"))
                yield reply
        except (TimeoutError, ConnectionError) as error:
            raise NotRunning(f"the runner stopped answering ({error})") from None
        if not finished:
            raise NotRunning("the runner went away before it had answered")


def _connect(path: Path, *, timeout: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        raise NotRunning("no runner is up", hint="Start one with `mlx-run apply MANIFEST`.") from None
    return connection


def _error(data: dict[str, Any]) -> MlxRunError:
    if data.get("diagnostics"):
        return ManifestError([Diagnostic(**d) for d in data["diagnostics"]])
    return ControlError(str(data.get("message", "unknown error")), hint=str(data.get("hint", "")))
