"""The other end of the control socket. Standard library only: `mlx-run status` should not wait for imports."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

from runner.errors import ControlError, Diagnostic, ManifestError, MlxRunError, NotRunning

_BUSY: Final = 10.0
"""Seconds that a runner may be too busy to take a connection, where no timeout says."""

_AGAIN: Final = 0.02
"""Seconds between two attempts at that."""


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
        except ValueError:  # a line that was cut with its writer
            raise NotRunning("the runner went away in the middle of its answer") from None
        if not finished:
            raise NotRunning("the runner went away before it had answered")


def _connect(path: Path, *, timeout: float | None) -> socket.socket:
    """Raises NotRunning; `timeout` is seconds, also for a runner that has more to answer than it comes round to."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    give_up = time.monotonic() + (_BUSY if timeout is None else timeout)
    try:
        while True:
            try:
                connection.connect(str(path))
            except BlockingIOError:  # its queue of connections is full: unlike TCP's, nobody waits in line
                if time.monotonic() > give_up:
                    raise NotRunning("the runner does not answer: too many ask at once, or it hangs") from None
                time.sleep(_AGAIN)
            else:
                return connection
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        raise NotRunning("no runner is up", hint="Start one with `mlx-run apply MANIFEST`.") from None
    except PermissionError:
        connection.close()
        raise NotRunning(f"{path} may not be used by this user", hint="A runner answers its owner.") from None
    except BaseException:
        connection.close()
        raise


def _error(data: dict[str, Any]) -> MlxRunError:
    if data.get("diagnostics"):
        return ManifestError([Diagnostic(**d) for d in data["diagnostics"]])
    return ControlError(str(data.get("message", "unknown error")), hint=str(data.get("hint", "")))
