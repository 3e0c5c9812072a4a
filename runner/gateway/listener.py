"""A listener: one `servers` entry of the manifest, open on its port until it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Final

from runner.errors import ListenerError
from runner.gateway.call import Application, Receive, Scope, Send
from runner.gateway.embedded import EmbeddedServer
from runner.gateway.guard import Guard
from runner.gateway.policy import Policy
from runner.gateway.sockets import Connection, bind, connections, ends, is_free, sever
from runner.plan.spec import ListenerSpec
from runner.telemetry import GatewayMetrics

if TYPE_CHECKING:
    from runner.gateway.admin.control import Control
    from runner.gateway.backend import Directory

logger = logging.getLogger(__name__)

_HANDSHAKE: Final = 1.0
"""Seconds for TLS handshakes that are under way when another listener takes over."""

_SETTLE: Final = 0.3
"""Seconds for connections to close once their requests have ended."""

_LOOK: Final = 0.001
"""Seconds between two looks at a port that is about to be free."""

_LOOKS: Final = 2000
"""Looks until it is for whoever binds the port to find that it is not free."""

_THREADS_END: Final = 0.005
"""Seconds that Granian's threads need for their last references to Python objects."""

_WARM_UP_DELAY: Final = 0.1
"""Seconds from the first listener's opening to the import of Falcon, unless a request needs it before."""


class Listener:
    """Serves `spec` from the running event loop. `metrics` is shared by a runner's listeners; `control` is for those
    with the admin API."""

    def __init__(
        self, spec: ListenerSpec, directory: Directory, metrics: GatewayMetrics, control: Control | None = None
    ) -> None:
        self.spec = spec
        self._directory = directory
        self._metrics = metrics
        self._control = control
        self._app: Application | None = None
        self._guard = Guard(spec.name, Policy(spec), self._serve, metrics)
        self._server: EmbeddedServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._port = spec.port
        self._released: frozenset[Connection] | None = None
        self._closed = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; the port that was bound, once it is, when the spec says 0."""
        return (self.spec.host, self._port)

    @property
    def in_flight(self) -> int:
        """Requests being worked on."""
        return self._guard.in_flight

    async def start(self, sock: socket.socket | None = None) -> None:
        """Returns when clients can connect, to `sock` where it is given: it listens already.

        Raises ListenerError when the port cannot be had, or the certificate cannot be used.
        """
        assert self._serving is None, "a listener starts once"
        sock = sock or bind(self.spec.host, self.spec.port)
        self._port = sock.getsockname()[1]
        try:
            self._server = EmbeddedServer(self._guard, sock, self.spec.tls)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            sock.close()
            raise ListenerError(f"cannot serve on {self.spec.host}:{self._port}: {error}") from None
        self._serving = asyncio.create_task(self._server.serve(), name=f"listener-{self.spec.name}")
        started = asyncio.create_task(self._server.started.wait())
        await asyncio.wait({self._serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            started.cancel()
            sock.close()
            raise ListenerError(f"cannot serve on {self.spec.host}:{self._port}: {self._serving.exception()!r}")
        self._serving.add_done_callback(self._on_end)
        asyncio.get_running_loop().call_later(_WARM_UP_DELAY, self._application)

    def update(self, spec: ListenerSpec) -> None:
        """Takes over everything but the address, for the requests that follow."""
        assert (spec.name, spec.address) == (self.spec.name, self.spec.address), "that is another listener"
        assert spec.tls == self.spec.tls, "a certificate is for as long as a listener serves"
        if spec.apis != self.spec.apis:
            self._app = None
        self._guard.policy = Policy(spec)
        self.spec = spec

    def hand_over(self) -> socket.socket:
        """The socket that it listens on, for another listener; running requests go on until `close`.

        Nobody is refused meanwhile: who connects waits until the other one accepts.
        """
        assert self._server is not None, "it serves"
        self._released = frozenset(map(ends, connections(self._port)))
        return self._server.hand_over()

    async def release(self) -> None:
        """Gives the port back, so that another listener can have it at once; running requests go on until `close`."""
        if self._server is None or self._released is not None:
            return
        # Known by now, since the next listener of this port will have connections of its own.
        self._released = frozenset(map(ends, connections(self._port)))
        self._server.stop()
        for _ in range(_LOOKS):
            if is_free(self.spec.host, self._port):
                return
            await asyncio.sleep(_LOOK)

    async def close(self, deadline: float) -> int:
        """Refuses new connections at once, gives running requests `deadline` seconds, then cuts them.

        Returns how many were cut. The port is free, and all connections are closed, when this returns. While one call
        waits, another with less time cuts them at the end of that.
        """
        if self._server is None or self._serving is None:
            return 0
        if self._closed:
            return await self._end_requests(deadline)
        self._closed = True
        if self._released is not None and not self._server.interrupt_signal:  # handed over
            await asyncio.sleep(_HANDSHAKE)
        self._server.stop()
        cut = await self._end_requests(deadline)
        await asyncio.wait({self._serving}, timeout=_SETTLE)
        if not self._serving.done():  # Granian waits for those, and for requests that have come in part
            sever(self._port, self._released)
            await asyncio.wait({self._serving}, timeout=_SETTLE)
        await self._guard.wait_idle()
        # Its threads say that they have ended a moment before they have, and abort the process when the interpreter
        # ends in between (1 of 60 exits on a busy machine; none of 360 with this).
        await asyncio.sleep(_THREADS_END)
        return cut

    async def _end_requests(self, deadline: float) -> int:
        """Waits for them, and cuts those that are left then. Returns how many; who does not read may still be there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await self._guard.wait_idle()
        cut = self._guard.cut()
        with contextlib.suppress(TimeoutError):  # a client that does not read is not told why
            async with asyncio.timeout(_SETTLE):
                await self._guard.wait_idle()
        return cut

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._application()(scope, receive, send)

    def _application(self) -> Application:
        """The app, made when it is first needed."""
        if self._app is None:
            # Falcon costs 45 ms of imports: the port opens, and /health answers, without waiting for them.
            from runner.gateway.app import build_app  # noqa: PLC0415

            self._app = build_app(self.spec, self._directory, self._metrics, self._control)
        return self._app

    def _on_end(self, serving: asyncio.Task[None]) -> None:
        assert self._server is not None
        if not self._server.interrupt_signal:
            error = None if serving.cancelled() else serving.exception()
            logger.error("listener ended unexpectedly", extra={"listener": self.spec.name}, exc_info=error)
