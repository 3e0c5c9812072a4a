"""The official `ollama` package over a real listener."""

from __future__ import annotations

from collections.abc import AsyncIterator

import ollama
import pytest

from runner.gateway.listener import Listener
from runner.protocol import Delta, ToolCall, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory

USER = {"role": "user", "content": "hi"}


@pytest.fixture
async def client(directory: FakeDirectory, metrics: GatewayMetrics) -> AsyncIterator[ollama.AsyncClient]:
    listener = Listener(spec_of(apis=("ollama",)), directory, metrics)
    await listener.start()
    host, port = listener.address
    client = ollama.AsyncClient(host=f"http://{host}:{port}")
    yield client
    await client._client.aclose()
    await listener.close(0)


async def test_chat_and_stream(client: ollama.AsyncClient) -> None:
    answer = await client.chat("chat", [USER], options={"temperature": 0.5})
    assert answer.message.content == "Hello world"
    assert answer.eval_count == 2
    parts = [part.message.content async for part in await client.chat("chat", [USER], stream=True)]
    assert "".join(part or "" for part in parts) == "Hello world"


async def test_tools_round_trip(client: ollama.AsyncClient, deployment: FakeDeployment) -> None:
    def get_weather(city: str) -> str:
        """The weather.

        Args:
          city: where
        """
        return f"sunny in {city}"

    call = [[Delta(0, "", 1, "tool_calls", Usage(7, 2), calls=[ToolCall("get_weather", '{"city": "Oslo"}')])]]
    deployment.scripts = [call, *deployment.scripts]
    first = await client.chat("chat", [USER], tools=[get_weather])
    assert first.message.tool_calls is not None
    (called,) = first.message.tool_calls
    result = get_weather(**called.function.arguments)
    tool = {"role": "tool", "content": result, "tool_name": "get_weather"}
    second = await client.chat("chat", [USER, first.message, tool], tools=[get_weather])
    assert second.message.content == "Hello world"
    messages = deployment.requests[1].messages
    assert messages is not None
    assert messages[-1] == {"role": "tool", "content": "sunny in Oslo", "name": "get_weather"}


async def test_generate_list_show_ps_pull(client: ollama.AsyncClient) -> None:
    assert (await client.generate("chat", "hi")).response == "Hello world"
    assert "chat:pirate" in [model.model for model in (await client.list()).models]
    assert (await client.show("chat")).capabilities
    assert (await client.ps()).models[0].model == "chat"
    assert [step.status async for step in await client.pull("chat", stream=True)][-1] == "success"


async def test_errors_are_the_packages_own(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="llama3") as missing:
        await client.chat("llama3", [USER])
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as refused:
        await client.embed("chat", "text")
    assert refused.value.status_code == 501
