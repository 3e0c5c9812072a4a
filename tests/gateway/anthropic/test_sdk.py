"""The official `anthropic` package over a real listener."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anthropic
import pytest

from runner.gateway.listener import Listener
from runner.protocol import Delta, ToolCall, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import client_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory

USER: anthropic.types.MessageParam = {"role": "user", "content": "hi"}


@pytest.fixture
async def client(directory: FakeDirectory, metrics: GatewayMetrics) -> AsyncIterator[anthropic.AsyncAnthropic]:
    listener = Listener(spec_of(apis=("anthropic",)), directory, metrics)
    await listener.start()
    host, port = listener.address
    async with anthropic.AsyncAnthropic(base_url=f"http://{host}:{port}", api_key="none", max_retries=0) as client:
        yield client
    await listener.close(0)


async def test_message_and_adapter(client: anthropic.AsyncAnthropic, deployment: FakeDeployment) -> None:
    message = await client.messages.create(
        model="chat", max_tokens=9, messages=[USER], extra_body={"adapter_name": "pirate"}
    )
    assert [block.text for block in message.content if block.type == "text"] == ["Hello world"]
    assert deployment.requests[0].adapter == "key-pirate"


async def test_stream_with_thinking_and_a_call(client: anthropic.AsyncAnthropic, deployment: FakeDeployment) -> None:
    deployment.scripts = [
        [
            [Delta(0, "", 1, None, Usage(7, 1), reasoning="Hm.")],
            [Delta(0, "grü", 1), Delta(0, "ße", 1)],
            [Delta(0, "", 1, "tool_calls", Usage(7, 3), calls=[ToolCall("f", '{"a": [1, 2]}')])],
        ]
    ]
    async with client.messages.stream(model="chat", max_tokens=9, messages=[USER]) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "message_stop"} <= set(kinds)
    thinking, text, call = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "Hm."
    assert text.type == "text"
    assert text.text == "grüße"
    assert call.type == "tool_use"
    assert call.input == {"a": [1, 2]}
    assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", 3)


async def test_errors_are_the_packages_own(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="unknown", max_tokens=9, messages=[USER])
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        await client.messages.create(model="chat", max_tokens=9, messages=[USER], extra_body={"temperature": 3})


async def test_counting(client: anthropic.AsyncAnthropic, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "", 0, "stop", Usage(42, 0))]]]
    assert (await client.messages.count_tokens(model="chat", messages=[USER])).input_tokens == 42


async def test_models_are_listed_for_each_kind_of_client(
    client: anthropic.AsyncAnthropic, directory: FakeDirectory, metrics: GatewayMetrics
) -> None:
    assert [model.id async for model in client.models.list()] == ["chat", "org/gpt-4o", "chat:pirate", "chat:shout"]
    assert (await client.models.retrieve("chat:pirate")).display_name == "chat:pirate"
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("unknown")
    for apis in (("openai", "anthropic"), ("anthropic", "openai")):
        both = client_of(spec_of(apis=apis), directory, metrics)
        assert (await both.get("/v1/models")).json["object"] == "list"
        assert (await both.get("/v1/models/chat")).json["object"] == "model"
        assert (await both.get("/v1/models", anthropic_version="2023-06-01")).json["has_more"] is False
        assert (await both.get("/v1/models/chat", anthropic_version="2023-06-01")).json["type"] == "model"
