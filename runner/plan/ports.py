"""Whether a manifest's ports can be had here, without taking them: a runner may be opening them right now."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from runner.manifest.load import Loaded
from runner.manifest.tree import Problem

_LINUX: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def check_ports(loaded: Loaded, own: Collection[int]) -> Iterator[Problem]:
    """Ports that `apply` would not get. `own` are those that this manifest's runner has already."""
    first = _first_free()
    for name, server in loaded.manifest.servers.items():
        path = ("servers", name, "port")
        if server.port in own:
            continue
        if server.port < first and os.geteuid() != 0:
            message = f"{server.port} is a port that only root may open here"
            yield Problem("W502", path, message, f"give {first} or more, such as 8080")
        elif _answers(server.host, server.port):
            message = f"somebody listens on {server.host}:{server.port} already"
            yield Problem("W503", path, message, f"stop it (`lsof -i :{server.port}` names it), or give another port")


def _first_free() -> int:
    """The first port that everybody may open."""
    if sys.platform == "linux":
        try:
            return int(_LINUX.read_text(encoding="ascii"))
        except (OSError, ValueError):
            pass
    return 1024


def _answers(host: str, port: int) -> bool:
    """Whether a connection is accepted there."""
    address = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        try:
            return probe.connect_ex((address, port)) == 0
        except OSError:
            return False
