"""Every API's way to ask for JSON is the same grammar to the engine."""

from __future__ import annotations

from typing import Any

import pytest

from runner.protocol import Grammar
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import client_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{}}}'
ANY = '{"type":"object"}'
TURN = [{"role": "user", "content": "hi"}]
DESCRIBED = {"type": "json_schema", "name": "thing", "strict": True, "schema": SCHEMA}

ASKED: list[tuple[str, dict[str, Any], Grammar | None]] = [
    ("/v1/responses", {"input": "hi", "text": {"format": {"type": "text"}}}, None),
    (
        "/v1/responses",
        {"input": "hi", "text": {"format": {"type": "json_object"}}},
        Grammar("json", ANY, "text.format"),
    ),
    ("/v1/responses", {"input": "hi", "text": {"format": DESCRIBED}}, Grammar("json", TEXT, "text.format.schema")),
    ("/api/chat", {"messages": TURN, "format": "json"}, Grammar("json", ANY, "format")),
    ("/api/chat", {"messages": TURN, "format": SCHEMA}, Grammar("json", TEXT, "format")),
    ("/api/chat", {"messages": TURN, "format": ""}, None),
    ("/api/generate", {"prompt": "hi", "format": SCHEMA}, Grammar("json", TEXT, "format")),
    (
        "/v1/messages",
        {"messages": TURN, "max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        Grammar("json", TEXT, "output_config.format.schema"),
    ),
    (
        "/v1/messages",
        {"messages": TURN, "max_tokens": 9, "output_format": {"type": "json_schema", "schema": SCHEMA}},
        Grammar("json", TEXT, "output_format.schema"),
    ),
]


@pytest.mark.parametrize(("path", "fields", "grammar"), ASKED)
async def test_reaches_the_engine(
    directory: FakeDirectory,
    metrics: GatewayMetrics,
    deployment: FakeDeployment,
    path: str,
    fields: dict[str, Any],
    grammar: Grammar | None,
) -> None:
    client = client_of(spec_of(apis=("openai", "anthropic", "ollama")), directory, metrics)
    answer = await client.post(path, {"model": "chat", "stream": False, **fields})
    assert answer.status_code == 200, answer.text
    assert [request.grammar for request in deployment.requests] == [grammar]
