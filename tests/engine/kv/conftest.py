"""The kernel that writes and attends: on the device, or compiled for the host once a session."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.launches import OnDevice, OnHost, only_with_arrays_on_the_host


@pytest.fixture(scope="session")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> OnHost | OnDevice:
    """The kernel, where it can run; else its source on the host."""
    if mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu):
        return OnDevice()
    only_with_arrays_on_the_host()
    return OnHost(tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    only_with_arrays_on_the_host()
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def on_host(scratch: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> CopiesOnHost:
    """Rows are copied, moved and begun as if there were a device."""
    return CopiesOnHost(scratch / request.node.name, monkeypatch)
