"""Granian's embedded server on a socket that is bound already.

The socket is handed over through the one private method that makes Granian's own (`_init_shared_socket`; tests/gateway
pins what it must do). Granian's log goes where ours goes: it gets no handlers of its own, and the configuration of the
rest of the process's logging stays as it is.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any, Final

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from runner.gateway.sockets import BACKLOG
from runner.plan.spec import TlsSpec

MAX_CONNECTIONS: Final = 4096
"""Open at once, idle keep-alive connections included; those beyond wait in the backlog."""

HEADER_TIMEOUT_MS: Final = 10_000
READ_BUFFER_BYTES: Final = 64 * 1024

_LOGGING: Final = {
    "incremental": True,
    "formatters": {},
    "filters": {},
    "handlers": {},
    "loggers": {"_granian": {"propagate": True}, "granian.access": {"propagate": True}},
}


class EmbeddedServer(Server):  # type: ignore[misc] # granian has no types for it
    """One worker in the running loop, HTTP/1.1 only. Takes over `sock`, and closes it when it stops serving."""

    def __init__(self, application: Any, sock: socket.socket, tls: TlsSpec | None = None) -> None:
        host, port = sock.getsockname()[:2]
        super().__init__(
            application,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            runtime_threads=1,
            runtime_blocking_threads=1,
            blocking_threads=1,
            backlog=BACKLOG,
            backpressure=MAX_CONNECTIONS,
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_TIMEOUT_MS, max_buffer_size=READ_BUFFER_BYTES),
            log_level=LogLevels.error,
            log_dictconfig=_LOGGING,
            ssl_cert=tls.cert if tls else None,
            ssl_key=tls.key if tls else None,
            ssl_protocol_min=SSLProtocols.tls12,
        )
        self._sock = sock
        self.started = asyncio.Event()
        self.on_startup(self.started.set)

    def hand_over(self) -> socket.socket:
        """Its listening socket, for another server: clients that connect wait there until that one accepts.

        Stopping would cut connections that are in their TLS handshake. So this one goes on, and the descriptor that it
        accepts from becomes a socket to which nobody connects.
        """
        sock = socket.socket(fileno=os.dup(self._sfd))
        with socket.socket(sock.family, socket.SOCK_STREAM) as nobody:
            nobody.setblocking(False)
            nobody.bind(("::1" if sock.family == socket.AF_INET6 else "127.0.0.1", 0))
            nobody.listen(1)
            os.dup2(nobody.fileno(), self._sfd, inheritable=False)
        return sock

    def _init_shared_socket(self) -> None:
        """Granian's, with our socket in place of one that it would build. The worker owns the descriptor from here."""
        make_holder: Any = SocketHolder  # (fd, is a unix socket), and on Linux the backlog, to be called with again
        fd = self._sock.detach()
        self._ssp = None
        self._shd = make_holder(fd, False, BACKLOG) if sys.platform == "linux" else make_holder(fd, False)
        self._sfd = self._shd.get_fd()
