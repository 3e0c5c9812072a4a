from __future__ import annotations

import socket
from pathlib import Path

from runner.gateway.sockets import bind, connections, sever


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_bind_does_not_share() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        assert not sock.get_inheritable()


def test_bind_to_ipv6() -> None:
    if not socket.has_ipv6:
        return
    with bind("::1", 0) as sock:
        assert sock.family == socket.AF_INET6


def test_connections_send_small_pieces_at_once() -> None:
    with bind("127.0.0.1", 0) as listening:
        listening.setblocking(True)
        with socket.create_connection(listening.getsockname()):
            accepted, _ = listening.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connections_are_those_of_clients_to_the_port() -> None:
    with bind("127.0.0.1", 0) as listening, bind("127.0.0.1", 0) as other:
        listening.setblocking(True)
        address, elsewhere = listening.getsockname(), other.getsockname()
        with socket.create_connection(address) as client, socket.create_connection(elsewhere):
            accepted, _ = listening.accept()
            with accepted:
                before = descriptors()
                found = [sock.getpeername() for sock in connections(address[1])]
                assert found == [client.getsockname()]
                assert descriptors() == before
                sever(address[1])
                assert client.recv(1) == b""
                client.close()
        with socket.create_connection(address):
            pass  # the listening socket still listens
