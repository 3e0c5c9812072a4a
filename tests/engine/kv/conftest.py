"""The kernel that writes and attends: on the device, or compiled for the host once a session."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.launches import OnDevice, OnHost, only_with_arrays_on_the_host


@pytest.fixture(scope="session")
def in_place() -> OnHost | OnDevice:
    """The kernel, where it can run; else its source on the host."""
    if mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu):
        return OnDevice()
    only_with_arrays_on_the_host()
    return OnHost()


@pytest.fixture(scope="session")
def arrays_on_the_host() -> None:
    only_with_arrays_on_the_host()


@pytest.fixture
def on_host(arrays_on_the_host: None, monkeypatch: pytest.MonkeyPatch) -> CopiesOnHost:
    """Rows are copied, moved and begun as if there were a device."""
    return CopiesOnHost(monkeypatch)
