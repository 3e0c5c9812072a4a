"""The kernel that writes and attends, compiled once a session."""

from __future__ import annotations

import pytest

from tests.engine.kv.launches import OnHost


@pytest.fixture(scope="session")
def in_place(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    """The kernel on the host."""
    return OnHost(tmp_path_factory.mktemp("attention"))
