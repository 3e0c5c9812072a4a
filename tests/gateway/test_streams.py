"""What the streams of all APIs have in common."""

from __future__ import annotations

from typing import Any

import pytest

from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import client_of, spec_of
from tests.gateway.fakes import FakeDirectory

MESSAGES = [{"role": "user", "content": "hi"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", STREAMS)
async def test_proxies_pass_pieces_on_as_they_come(
    directory: FakeDirectory, metrics: GatewayMetrics, path: str
) -> None:
    """nginx collects an answer before it sends any of it on, unless the answer says not to."""
    client = client_of(spec_of(apis=("openai", "anthropic", "ollama")), directory, metrics)
    answer = await client.post(path, {"model": "chat", "stream": True, **STREAMS[path]})
    assert answer.status_code == 200
    assert answer.headers["x-accel-buffering"] == "no"
    whole = await client.post(path, {"model": "chat", "stream": False, **STREAMS[path]})
    assert "x-accel-buffering" not in whole.headers
