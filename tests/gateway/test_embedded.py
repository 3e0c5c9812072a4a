"""What this package relies on in Granian without its documentation saying so: a new release may break it."""

from __future__ import annotations

import inspect
import socket
import sys

import granian
from granian.server.common import AbstractServer
from granian.server.embed import Server

from runner.gateway.embedded import EmbeddedServer
from runner.gateway.sockets import bind


def test_granian_is_a_release_this_was_tried_with() -> None:
    assert granian.__version__.startswith("2.8."), "run this file's tests against the new release, then say so here"


def test_the_method_that_is_overridden_is_the_one_that_makes_the_socket() -> None:
    assert "_init_shared_socket" in vars(AbstractServer)
    assert list(inspect.signature(AbstractServer._init_shared_socket).parameters) == ["self"]
    source = inspect.getsource(Server)
    assert "self._init_shared_socket()" in source
    assert "(self._ssp, self._shd)" in source, "the worker is given a spec or a held socket"


async def test_the_held_socket_is_the_one_that_was_bound() -> None:
    sock = bind("127.0.0.1", 0)
    descriptor, address = sock.fileno(), sock.getsockname()
    server = EmbeddedServer(None, sock)
    server._init_shared_socket()
    assert server._ssp is None
    assert server._shd.get_fd() == descriptor
    assert not server._shd.is_uds()
    assert sock.fileno() == -1, "Granian closes the descriptor: nobody else may"
    if sys.platform == "linux":
        assert len(server._shd.__getstate__()) == 3
    with socket.socket(fileno=descriptor) as again:
        assert again.getsockname() == address
