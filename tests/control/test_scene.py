"""What tests that run side by side must not take from each other."""

import socket
from itertools import islice

import pytest

from tests.control import scene


def given(worker: str, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every port that a worker's tests can have."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    return set(islice(scene._own_ports.__wrapped__(), len(scene._PORTS)))


def test_workers_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [given(f"gw{number}", monkeypatch) for number in range(8)]
    assert len(set.union(*found)) == sum(map(len, found))
    assert min(map(len, found)) > 1000, "none comes again while it is in use"


def test_a_port_that_somebody_listens_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, other = scene.free_port(), scene.free_port()
    monkeypatch.setattr(scene, "_own_ports", lambda: iter([taken, other]))
    with socket.create_server(("127.0.0.1", taken)):
        assert scene.free_port() == other
