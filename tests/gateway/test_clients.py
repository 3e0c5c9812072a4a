"""The official `openai` package over a real listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from runner.errors import EngineFailed, Unavailable
from runner.gateway.listener import Listener
from runner.protocol import Delta, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.fakes import FakeDeployment, logprob, text_script

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(listener: Listener) -> AsyncIterator[openai.AsyncOpenAI]:
    host, port = listener.address
    async with openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI, deployment: FakeDeployment) -> None:
    answer = await client.chat.completions.create(
        model="chat:pirate", messages=MESSAGES, temperature=0.5, extra_body={"top_k": 5, "min_p": 0.1}
    )
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "chat:pirate"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    sampling = deployment.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 5, 0.1)
    again = await client.chat.completions.create(
        model="chat", messages=[*MESSAGES, answer.choices[0].message, *MESSAGES], extra_body={"adapter_name": "shout"}
    )
    assert again.choices[0].message.content == "Hello world"
    assert deployment.requests[1].adapter == "key-shout"


async def test_chat_stream(client: openai.AsyncOpenAI, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("grü", "ße ", "漢", "字")]
    text = ""
    usage = None
    async with client.chat.completions.stream(
        model="chat", messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        async for event in stream:
            if event.type == "content.delta":
                text += event.delta
        usage = (await stream.get_final_completion()).usage
    assert text == "grüße 漢字"
    assert usage is not None
    assert usage.completion_tokens == 4


async def test_logprobs_and_choices(client: openai.AsyncOpenAI, deployment: FakeDeployment) -> None:
    entry = logprob("yes", -0.1, ("yes", -0.1), ("no", -2.4))
    deployment.scripts = [[[Delta(0, "yes", 1, "stop", Usage(1, 1), [entry])]]]
    answer = await client.chat.completions.create(
        model="chat", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, seed=1
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [t.token for t in choice.logprobs.content[0].top_logprobs] == ["yes", "no"]


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="chat", prompt="once", logprobs=1)
    assert answer.choices[0].text == "Hello world"
    stream = await client.completions.create(model="chat", prompt="once", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["chat", "org/gpt-4o", "chat:pirate", "chat:shout"]
    for name in ("chat:pirate", "org/gpt-4o"):
        assert (await client.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")


async def test_errors_are_the_packages_own(client: openai.AsyncOpenAI, deployment: FakeDeployment) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="chat", messages=MESSAGES, extra_body={"temprature": 1})
    assert (bad.value.param, bad.value.code) == ("temprature", "unknown_field")
    assert bad.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    deployment.scripts = [[Unavailable("loading")], [EngineFailed("out of memory")]]
    with pytest.raises(openai.InternalServerError) as loading:
        await client.chat.completions.create(model="chat", messages=MESSAGES)
    assert (loading.value.status_code, loading.value.response.headers["retry-after"]) == (503, "1")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        await client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_an_engine_that_dies_mid_stream_raises_in_the_client(
    client: openai.AsyncOpenAI, deployment: FakeDeployment, api: str
) -> None:
    deployment.scripts = [[[Delta(0, "Hel", 1)], EngineFailed("the engine died while it worked on this request")]]
    if api == "chat":
        stream = await client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
    else:
        stream = await client.completions.create(model="chat", prompt="once", stream=True)
    await anext(stream)
    with pytest.raises(openai.APIError, match="the engine died"):
        [chunk async for chunk in stream]


async def test_wrong_and_right_keys(listener: Listener) -> None:
    host, port = listener.address
    listener.update(type(listener.spec)(name="lm", host=host, port=0, models=("chat",), api_keys=("right",)))
    for key, ok in (("right", True), ("wrong", False)):
        async with openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key=key, max_retries=0) as client:
            if ok:
                assert (await client.models.retrieve("chat")).id == "chat"
            else:
                with pytest.raises(openai.AuthenticationError):
                    await client.models.retrieve("chat")


async def test_the_synchronous_client(listener: Listener, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("Hel", "lo")]
    host, port = listener.address

    def talk() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="chat", messages=MESSAGES)
            with client.chat.completions.create(model="chat", messages=MESSAGES, stream=True) as stream:
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return whole.choices[0].message.content, streamed

    assert await asyncio.to_thread(talk) == ("Hello", "Hello")


async def test_64_streams_at_once(
    client: openai.AsyncOpenAI, deployment: FakeDeployment, metrics: GatewayMetrics, listener: Listener
) -> None:
    go = asyncio.Event()
    deployment.scripts = [[[Delta(0, "a", 1)], go, *([Delta(0, f" {i}", 1)] for i in range(20)), *text_script("!")]]

    async def one() -> str:
        stream = await client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    running = [asyncio.create_task(one()) for _ in range(64)]
    await deployment.until("opened == 64")
    assert deployment.closed == 0, "all of them are under way"
    go.set()
    expected = "a" + "".join(f" {i}" for i in range(20)) + "!"
    assert await asyncio.gather(*running) == [expected] * 64
    await deployment.until("closed == 64")
    await listener.close(5)
    assert metrics.requests.values == {("lm", "/v1/chat/completions", "chat", "200"): 64}, "nobody left"
