"""The Responses API: items in, items and events out, and conversations that go on."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from runner.errors import EngineFailed
from runner.gateway.listener import Listener
from runner.gateway.responses import wire
from runner.gateway.responses.store import ResponseStore
from runner.protocol import Delta, Sampling, ToolCall, Usage
from tests.gateway.conftest import Answer, Client
from tests.gateway.fakes import FakeDeployment, logprob, text_script

TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "description": "now"}


async def ask(client: Client, **fields: Any) -> Answer:
    return await client.post("/v1/responses", {"model": "chat", "input": "hi", **fields})


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """The data of each event; the name in front has to be its type, and numbers count up."""
    events = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def calling(deployment: FakeDeployment) -> None:
    """Thinks, says two words, and calls."""
    deployment.scripts = [
        [
            [Delta(0, "", 1, None, Usage(7, 1), reasoning="Hm.")],
            [Delta(0, "Looking", 1)],
            [Delta(0, " now.", 1)],
            [Delta(0, "", 1, "tool_calls", Usage(7, 4, 3, reasoning_tokens=1), calls=[ToolCall("get_weather", "{}")])],
        ],
        text_script("Sunny."),
    ]


async def test_a_response(client: Client, deployment: FakeDeployment) -> None:
    response = (
        await ask(client, instructions="Be brief.", temperature=0.5, max_output_tokens=9, metadata={"a": "b"})
    ).json
    assert response["id"].startswith("resp_")
    assert (response["object"], response["status"], response["error"]) == ("response", "completed", None)
    (message,) = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert [(part["type"], part["text"]) for part in message["content"]] == [("output_text", "Hello world")]
    assert response["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    assert (response["temperature"], response["max_output_tokens"], response["metadata"]) == (0.5, 9, {"a": "b"})
    (request,) = deployment.requests
    assert request.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert request.sampling == Sampling(temperature=0.5)
    assert request.max_tokens == 9


async def test_items_become_turns(client: Client, deployment: FakeDeployment) -> None:
    answer = await ask(
        client,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "It is sunny."}],
                "phase": "final_answer",
            },
            {"role": "user", "content": "Thanks"},
        ],
        tools=[TOOL],
    )
    assert answer.status_code == 200, answer.text
    (request,) = deployment.requests
    assert request.messages is not None
    assert [turn["role"] for turn in request.messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    called = request.messages[2]
    assert [call["id"] for call in called["tool_calls"]] == ["c1", "c2"]
    assert called["reasoning_content"] == "Hm."
    assert request.messages[3] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    assert request.tools == [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "now", "parameters": {"type": "object"}},
        }
    ]


async def test_the_whole_sequence_of_events(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    events = events_of(await ask(client, stream=True, tools=[TOOL]))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    last = events[-1]["response"]
    reasoning, message, call = last["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "Looking now."
    assert (call["name"], call["arguments"], call["status"]) == ("get_weather", "{}", "completed")
    assert last["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    indexes = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert indexes == [0, 1, 2]


async def test_a_conversation_goes_on(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    first = (await ask(client, tools=[TOOL], instructions="Be brief.")).json
    output = [{"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "sunny"}]
    second = (await ask(client, previous_response_id=first["id"], input=output, stream=True)).text
    assert "Sunny." in second
    messages = deployment.requests[1].messages
    assert messages is not None
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool"], "instructions are not carried over"
    assert messages[1]["content"] == "Looking now."
    assert messages[1]["reasoning_content"] == "Hm."
    assert messages[1]["tool_calls"][0]["function"]["name"] == "get_weather"
    third_id = json.loads(second.rpartition("data: ")[2])["response"]["id"]
    await ask(client, previous_response_id=third_id, input="And now?")
    messages = deployment.requests[2].messages
    assert messages is not None
    assert [turn["content"] for turn in messages] == ["hi", "Looking now.", "sunny", "Sunny.", "And now?"]


async def test_what_is_kept_can_be_read_and_forgotten(client: Client) -> None:
    response = (await ask(client)).json
    path = f"/v1/responses/{response['id']}"
    assert (await client.get(path)).json == response
    items = (await client.get(f"{path}/input_items")).json
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "hi"}]
    assert items["first_id"] == items["data"][0]["id"]
    assert (await client.request("DELETE", path)).json["deleted"]
    assert (await client.get(path)).status_code == 404
    unkept = (await ask(client, store=False)).json
    assert (await client.get(f"/v1/responses/{unkept['id']}")).status_code == 404
    refused = await ask(client, previous_response_id=unkept["id"])
    assert (refused.status_code, refused.json["error"]["code"]) == (400, "previous_response_not_found")


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most=3, most_bytes=400)
    for number in range(5):
        store.keep({"id": f"r{number}"}, [], [])
    assert (len(store), store.get("r1")) == (3, None)
    assert store.get("r2") is not None
    store.keep({"id": "r5"}, [], [])
    assert store.get("r2") is not None, "what was used last stays"
    store.keep({"id": "large", "text": "x" * 350}, [], [])
    assert store.nbytes <= 400
    store.keep({"id": "too large", "text": "x" * 500}, [], [])
    assert store.get("too large") is None
    for name in ("r2", "r3", "r4", "r5", "large"):
        store.drop(name)
    assert (len(store), store.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("choice", "names"),
    [("auto", []), ("required", ["get_weather"]), ({"type": "function", "name": "get_weather"}, ["get_weather"])],
)
async def test_what_has_to_be_called(client: Client, deployment: FakeDeployment, choice: Any, names: list[str]) -> None:
    assert (await ask(client, tools=[TOOL], tool_choice=choice)).status_code == 200
    assert deployment.requests[0].must_call == names


async def test_an_answer_that_is_cut_is_incomplete(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("a", reason="length")]
    response = (await ask(client)).json
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_an_error_after_the_first_event_fails_the_response(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "a", 1)], EngineFailed("broke")]]
    *_, error, failed = events_of(await ask(client, stream=True))
    assert (error["type"], error["message"]) == ("error", "broke")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")


async def test_logprobs(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [
        [[Delta(0, "a", 1, logprobs=[logprob("a", -0.5, ("a", -0.5))])], [Delta(0, "", 0, "stop", Usage(7, 1))]]
    ]
    response = (await ask(client, include=["message.output_text.logprobs"], top_logprobs=1)).json
    (entry,) = response["output"][0]["content"][0]["logprobs"]
    assert (entry["token"], entry["logprob"], len(entry["top_logprobs"])) == ("a", -0.5, 1)
    assert deployment.requests[0].sampling.logprobs == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "contnet": 1}]}, "input[0].contnet"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{}]}, "context_management"),
        ({"moderation": {}}, "moderation"),
    ],
)
async def test_what_is_wrong_is_named(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str
) -> None:
    answer = await ask(client, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json["error"]["param"].startswith(param)
    assert deployment.requests == []


def test_every_field_is_honoured_harmless_or_unsupported() -> None:
    honoured = {"input", "model", "instructions", "previous_response_id", "tools", "tool_choice", "stream", "store"}
    honoured |= {"parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "seed", "max_output_tokens"}
    honoured |= {"top_logprobs", "reasoning", "text", "metadata", "adapter_name", "chat_template_kwargs"}
    known = honoured | wire.HARMLESS | set(wire.UNSUPPORTED)
    assert set(wire.ResponsesRequest.__struct_fields__) == known


async def test_the_official_package(listener: Listener, deployment: FakeDeployment) -> None:
    calling(deployment)
    host, port = listener.address
    async with openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
        async with client.responses.stream(model="chat", input="hi", tools=[TOOL]) as stream:
            kinds = {event.type async for event in stream}
            first = await stream.get_final_response()
        assert "response.output_text.delta" in kinds
        assert first.output_text == "Looking now."
        second = await client.responses.create(model="chat", input="On", previous_response_id=first.id)
        assert second.output_text == "Sunny."
        assert (await client.responses.retrieve(second.id)).output_text == "Sunny."


async def test_an_input_is_counted(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "", 0, "stop", Usage(42, 0))]]]
    answer = await client.post("/v1/responses/input_tokens", {"model": "chat", "input": "hi", "instructions": "Be."})
    assert answer.json == {"object": "response.input_tokens", "input_tokens": 42}
    (asked,) = deployment.requests
    assert asked.count_only
    assert asked.messages == [{"role": "system", "content": "Be."}, {"role": "user", "content": "hi"}]
