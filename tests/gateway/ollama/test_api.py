"""Ollama's API: what goes to the engine, what comes back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.errors import EngineFailed, Unavailable
from runner.gateway.ollama import wire
from runner.protocol import Delta, Sampling, ToolCall, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Answer, Client, client_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture
def client(directory: FakeDirectory, metrics: GatewayMetrics) -> Client:
    return client_of(spec_of(apis=("openai", "ollama")), directory, metrics)


async def chat(client: Client, **fields: Any) -> Answer:
    return await client.post("/api/chat", {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **fields})


async def generate(client: Client, **fields: Any) -> Answer:
    return await client.post("/api/generate", {"model": "chat", "prompt": "hi", **fields})


def lines_of(answer: Answer) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_chat_streams_lines_by_itself(client: Client) -> None:
    first, second, last = lines_of(await chat(client))
    assert first["message"] == {"role": "assistant", "content": "Hello"}
    assert (first["model"], first["done"]) == ("chat", False)
    assert second["message"]["content"] == " world"
    assert last["done"]
    assert last["done_reason"] == "stop"
    assert (last["prompt_eval_count"], last["eval_count"]) == (7, 2)
    assert last["total_duration"] >= last["eval_duration"] > 0


async def test_a_chat_in_one_piece(client: Client) -> None:
    answer = (await chat(client, stream=False)).json
    assert answer["message"] == {"role": "assistant", "content": "Hello world"}
    assert answer["done"]


async def test_generate_goes_through_the_template_unless_raw(client: Client, deployment: FakeDeployment) -> None:
    answer = (await generate(client, system="Be brief.", stream=False)).json
    assert answer["response"] == "Hello world"
    assert deployment.requests[0].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    await generate(client, raw=True)
    assert (deployment.requests[1].messages, deployment.requests[1].prompt) == (None, "hi")


async def test_options_reach_the_sampler(client: Client, deployment: FakeDeployment) -> None:
    options = {"temperature": 0.5, "top_k": 5, "repeat_penalty": 1.2, "repeat_last_n": 7, "seed": 3, "num_predict": 9}
    await chat(client, options={**options, "stop": ["X"], "num_ctx": 4096, "num_gpu": 1, "mirostat": 0})
    (request,) = deployment.requests
    assert request.sampling == Sampling(
        temperature=0.5, top_k=5, repetition_penalty=1.2, repetition_context_size=7, seed=3
    )
    assert (request.max_tokens, request.stop) == (9, ["X"])


async def test_seed_minus_one_is_any_seed(client: Client, directory: FakeDirectory) -> None:
    """As Ollama's clients say it, whatever the manifest has."""
    directory.generation = {"seed": 5}
    await chat(client, options={"seed": -1})
    await chat(client, options={"seed": -2})
    await chat(client)
    assert [request.sampling.seed for request in directory.deployment.requests] == [None, -2, 5]


async def test_null_is_not_given(client: Client) -> None:
    assert len(lines_of(await chat(client, stream=None))) > 1
    assert (await chat(client, messages=None)).json["done_reason"] == "load"
    for path in ("/api/pull", "/api/create"):
        assert len(lines_of(await client.post(path, {"model": "chat", "stream": None}))) == 2


async def test_the_manifest_has_the_defaults(client: Client, directory: FakeDirectory) -> None:
    directory.generation = {"temperature": 0.7, "max_tokens": 40, "stop": "END"}
    await chat(client)
    await chat(client, options={"num_predict": -1, "temperature": 0})
    first, second = directory.deployment.requests
    assert (first.sampling.temperature, first.max_tokens, first.stop) == (0.7, 40, ["END"])
    assert (second.sampling.temperature, second.max_tokens) == (0, 0)


async def test_tools_thinking_and_turns(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [
        [
            [Delta(0, "", 1, reasoning="Hm.")],
            [Delta(0, "", 1, "tool_calls", Usage(7, 2), calls=[ToolCall("get_weather", '{"city": "Oslo"}')])],
        ]
    ]
    past = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "thinking": "So.", "tool_calls": [past]},
        {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
    ]
    thought, called, last = lines_of(await chat(client, messages=messages, tools=[TOOL], think=True))
    assert thought["message"]["thinking"] == "Hm."
    assert called["message"]["tool_calls"] == [{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]
    assert last["done_reason"] == "stop"
    (request,) = deployment.requests
    assert request.chat_template_kwargs == {"enable_thinking": True}
    assert request.tools == [TOOL]
    assert request.messages is not None
    assert request.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    ]
    assert request.messages[1]["reasoning_content"] == "So."
    assert request.messages[2] == {"role": "tool", "content": "sunny", "name": "get_weather"}


async def test_without_thinking_it_is_left_out(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "", 1, reasoning="Hm.")], [Delta(0, "a", 1, "stop", Usage(7, 2))]]]
    written, _ = lines_of(await chat(client, think=False))
    assert written["message"] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("keep_alive", "reason"), [(None, "load"), (0, "unload"), ("5m", "load"), ("1h30m", "load"), (-1, "load")]
)
async def test_nothing_to_say_makes_sure_of_the_model(
    client: Client, deployment: FakeDeployment, keep_alive: Any, reason: str
) -> None:
    answers = [await chat(client, messages=[], keep_alive=keep_alive)]
    answers.append(await generate(client, prompt="", keep_alive=keep_alive))
    for answer in answers:
        assert (answer.json["done"], answer.json["done_reason"]) == (True, reason)
    assert [request.count_only for request in deployment.requests] == ([] if reason == "unload" else [True, True])


async def test_a_model_that_cannot_be_loaded_is_not_said_to_be(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[Unavailable("no room", retry_after=2)]]
    answer = await chat(client, messages=[])
    assert (answer.status_code, answer.json, answer.headers["retry-after"]) == (503, {"error": "no room"}, "2")


async def test_an_adapter_is_a_model(client: Client, deployment: FakeDeployment) -> None:
    for model in ("chat:pirate", "chat:pirate:latest"):
        assert (await chat(client, model=model)).status_code == 200
    assert [request.adapter for request in deployment.requests] == ["key-pirate", "key-pirate"]
    assert (await chat(client, model="chat:latest")).status_code == 200


async def test_what_is_served(client: Client) -> None:
    names = [model["name"] for model in (await client.get("/api/tags")).json["models"]]
    assert names == ["chat", "org/gpt-4o", "chat:pirate", "chat:shout"]
    assert [model["name"] for model in (await client.get("/api/ps")).json["models"]] == ["chat"]
    shown = (await client.post("/api/show", {"model": "chat:pirate"})).json
    assert shown["details"]["parent_model"] == "chat"
    assert "completion" in shown["capabilities"]
    assert (await client.get("/api/version")).json["version"]
    assert (await client.get("/")).status_code == 200


async def test_pull_of_what_is_here_and_of_what_is_not(client: Client) -> None:
    assert lines_of(await client.post("/api/pull", {"model": "chat"}))[-1] == {"status": "success"}
    assert (await client.post("/api/pull", {"name": "chat:latest", "stream": False})).json == {"status": "success"}
    assert (await client.post("/api/pull", {"model": "hf.co/org/gpt-4o", "stream": False})).status_code == 403
    missing = await client.post("/api/pull", {"model": "llama3"})
    assert (missing.status_code, missing.json["error"]) == (404, "model 'llama3' not found: it is not in the manifest")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "chat"}, 200),
        ({"model": "chat:latest", "from": "chat"}, 200),
        ({"name": "chat", "stream": False, "parameters": {}}, 200),
        ({"model": "chat", "from": "llama3"}, 501),
        ({"model": "new", "from": "chat"}, 501),
        ({"model": "chat", "system": "You are a pirate."}, 501),
        ({}, 400),
    ],
)
async def test_create_makes_sure_of_what_the_manifest_has(client: Client, fields: Any, status: int) -> None:
    answer = await client.post("/api/create", fields)
    assert answer.status_code == status
    if status == 200:
        assert json.loads(answer.text.splitlines()[-1]) == {"status": "success"}
    else:
        assert isinstance(answer.json["error"], str)


@pytest.mark.parametrize("name", ["copy", "delete", "push", "embed", "embeddings"])
async def test_what_is_not_here_says_so(client: Client, name: str) -> None:
    answer = await client.post(f"/api/{name}", {"model": "chat"})
    assert answer.status_code == 501
    assert isinstance(answer.json["error"], str)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ({"format": "yaml"}, '"json" or a JSON Schema'),
        ({"format": [1]}, "format"),
        ({"options": {"temprature": 1}}, "did you mean `temperature`"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"model": "llama3"}, "llama3"),
        ({"stream": "yes"}, "stream"),
        ({"keep_alive": "xyz"}, "keep_alive"),
        ({"options": {"num_ctx": -1}}, "num_ctx"),
    ],
)
async def test_what_is_wrong_is_named(client: Client, fields: dict[str, Any], told: str) -> None:
    answer = await chat(client, **fields)
    assert answer.status_code in (400, 404)
    assert told in answer.json["error"]


@pytest.mark.parametrize("field", ["suffix", "template", "context", "images"])
async def test_generate_refuses_what_it_cannot_do(client: Client, field: str) -> None:
    answer = await generate(client, **{field: {"suffix": "x", "template": "x", "context": [1], "images": ["x"]}[field]})
    assert (answer.status_code, field in answer.json["error"]) == (400, True)


async def test_an_error_after_the_first_line_is_a_line(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "a", 1)], EngineFailed("broke")]]
    assert lines_of(await chat(client))[-1] == {"error": "broke"}


async def test_a_body_without_a_type_is_taken_but_not_from_a_page(client: Client) -> None:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
    assert (await client.post("/api/chat", body, "application/x-www-form-urlencoded")).status_code == 200
    headers = {"content-type": "text/plain", "content-length": str(len(body)), "origin": "http://evil.example"}
    assert (await client.request("POST", "/api/chat", [body], headers)).status_code in (403, 415)


def test_every_option_is_honoured_harmless_or_unsupported() -> None:
    honoured = {"temperature", "top_k", "top_p", "min_p", "seed", "num_predict", "stop", "repeat_penalty"}
    honoured |= {"repeat_last_n", "presence_penalty", "frequency_penalty"}
    hardware = {"f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_keep"}
    hardware |= {"num_thread", "numa", "use_mlock", "use_mmap", "vocab_only", "embedding_only"}
    tuning = {"mirostat_eta", "mirostat_tau"}  # of mirostat, which is refused
    known = honoured | hardware | tuning | set(wire.UNSUPPORTED_OPTIONS)
    assert set(wire.Options.__struct_fields__) == known
