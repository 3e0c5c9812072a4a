"""Ports are asked for, and never taken."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.manifest.load import Loaded, load_manifest
from runner.manifest.tree import Problem
from runner.plan import ports
from runner.plan.ports import check_ports


@pytest.fixture
def listening() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _loaded(folder: Path, *servers: str) -> Loaded:
    path = folder / "dev.yaml"
    lines = "".join(f"  s{i}: {{{text}}}\n" for i, text in enumerate(servers))
    path.write_text(f"name: dev\nservers:\n{lines}models: {{chat: {{source: ./chat}}}}\n")
    return load_manifest([path], {})


def _codes(problems: Iterator[Problem]) -> list[tuple[str, object]]:
    return [(problem.code, problem.path[1]) for problem in problems]


def test_a_port_where_somebody_listens(listening: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        loaded = _loaded(tmp_path, f"port: {listening}", f"port: {free.getsockname()[1]}")
        assert _codes(check_ports(loaded, ())) == [("W503", "s0")]
        assert _codes(check_ports(loaded, {listening})) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])
def test_a_wildcard_is_asked_for_on_loopback(host: str, listening: int, tmp_path: Path) -> None:
    loaded = _loaded(tmp_path, f"port: {listening}, host: {host}, auth: {{api_keys: [key-1]}}")
    assert _codes(check_ports(loaded, ())) == [("W503", "s0")]


def test_a_port_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _loaded(tmp_path, "port: 80", "port: 1024")
    monkeypatch.setattr(ports, "_first_free", lambda: 1024)
    monkeypatch.setattr(ports, "_answers", lambda *_: False)
    monkeypatch.setattr(ports.os, "geteuid", lambda: 1000)
    assert _codes(check_ports(loaded, ())) == [("W502", "s0")]
    monkeypatch.setattr(ports.os, "geteuid", lambda: 0)
    assert _codes(check_ports(loaded, ())) == []
