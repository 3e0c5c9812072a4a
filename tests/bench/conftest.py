from collections.abc import AsyncIterator

import pytest

from tests.bench.server import ScriptedServer


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    """A server that behaves as the test says."""
    async with ScriptedServer() as started:
        yield started
