"""The sockets of a listener: bound so that nobody else has the port, and found again to be closed.

Granian binds with SO_REUSEPORT, with which two servers share one port without a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection, Iterator
from typing import Any, Final

from runner.errors import ListenerError

BACKLOG: Final = 1024


Connection = tuple[Any, Any]
"""Both ends' addresses."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket of this process alone; port 0 takes a free one. Raises ListenerError.

    The first try is without SO_REUSEADDR, with which macOS would let us bind 127.0.0.1:8080 beside another process's
    *:8080 and take its clients. When only the remains of old connections are in the way, the second try has it.
    """
    try:
        family, kind, protocol, address = _resolve(host, port)
    except OSError as error:
        raise ListenerError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="set `host` to an address of this machine"
        ) from None
    try:
        return _listen(family, kind, protocol, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or _answers(family, address):
            raise _listener_error(host, port, error) from None
    try:
        return _listen(family, kind, protocol, address, reuse=True)
    except OSError as error:
        raise _listener_error(host, port, error) from None


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on this address any more; connections that are still open do not count."""
    family, kind, protocol, address = _resolve(host, port)
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _resolve(host: str, port: int) -> tuple[int, int, int, Any]:
    """Family, kind, protocol and address of a socket for it. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # "localhost" is both; clients that were told 127.0.0.1 are the more common.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, kind, protocol, address


def _listen(family: int, kind: int, protocol: int, address: Any, *, reuse: bool) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Its connections inherit this, and must have it for the port to be bound again while they are in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited too. Without it an answer's second piece waits for the client to acknowledge the first, and clients
        # put that off for 40 ms: on a connection that was kept, the first token came that much late.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _answers(family: int, address: Any) -> bool:
    """Whether somebody listens there."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(address) == 0


def _listener_error(host: str, port: int, error: OSError) -> ListenerError:
    if error.errno == errno.EADDRINUSE:
        reason, hint = (
            "another process listens there",
            f"stop it (`lsof -i :{port}` names it), or choose another `port`",
        )
    elif error.errno == errno.EADDRNOTAVAIL:
        reason, hint = "not an address of this machine", "set `host` to 127.0.0.1, or to an address of this machine"
    elif error.errno in (errno.EACCES, errno.EPERM):
        reason, hint = "not permitted", "choose a `port` above 1023"
    else:
        reason, hint = error.strerror or str(error), "choose another `host` or `port`"
    return ListenerError(f"cannot listen on {host}:{port}: {reason}", hint=hint)


def connections(port: int) -> Iterator[socket.socket]:
    """Duplicates of the connections that clients hold to a port of this process, each closed after its turn.

    Granian keeps its own to itself, so they are looked for among the process's descriptors.
    """
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - names, not files
        try:
            descriptor = os.dup(int(name))
        except OSError:  # the listing's own, closed by now
            continue
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:  # not a socket
            os.close(descriptor)
            continue
        with sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == port and _has_peer(sock):
                yield sock


def ends(connection: socket.socket) -> Connection:
    """What tells a connection from others."""
    return (connection.getsockname(), connection.getpeername())


def sever(port: int, only: Collection[Connection] | None = None) -> None:
    """Ends the connections to a port, or `only` these of them, as if their clients had left."""
    for sock in connections(port):
        with contextlib.suppress(OSError):
            if only is None or ends(sock) in only:
                sock.shutdown(socket.SHUT_RDWR)


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
