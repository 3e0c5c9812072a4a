"""Anthropic's messages: what goes to the engine, what comes back, and how errors look."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.errors import EngineFailed, Unavailable
from runner.gateway.anthropic import wire
from runner.protocol import Delta, Sampling, ToolCall, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Answer, Client, client_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory, text_script

TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather now",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
SHOWN = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": TOOL["input_schema"],
        "description": "The weather now",
    },
}


@pytest.fixture
def client(directory: FakeDirectory, metrics: GatewayMetrics) -> Client:
    return client_of(spec_of(apis=("openai", "anthropic")), directory, metrics)


async def ask(client: Client, path: str = "/v1/messages", **fields: Any) -> Answer:
    body = {"model": "chat", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}], **fields}
    return await client.post(path, {key: value for key, value in body.items() if value is not ...})


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event; the name in front has to be its type."""
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_a_message(client: Client, deployment: FakeDeployment) -> None:
    answer = await ask(client, system="Be brief.", temperature=0.5, top_k=5, stop_sequences=["END"])
    assert answer.status_code == 200, answer.text
    message = answer.json
    assert message["id"].startswith("msg_")
    assert message["content"] == [{"type": "text", "text": "Hello world", "citations": None}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (4, 3, 2)
    (request,) = deployment.requests
    assert request.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert request.sampling == Sampling(temperature=0.5, top_k=5)
    assert (request.max_tokens, request.stop) == (64, ["END"])
    assert not request.continue_final


async def test_the_manifest_has_the_defaults(client: Client, directory: FakeDirectory) -> None:
    directory.generation = {"temperature": 0.7, "presence_penalty": 0.5, "stop": "X", "max_tokens": 9}
    await ask(client, temperature=0.1)
    (request,) = directory.deployment.requests
    assert request.sampling == Sampling(temperature=0.1, presence_penalty=0.5)
    assert (request.max_tokens, request.stop) == (64, ["X"])


async def test_the_line_for_anthropic_s_accounts_is_no_prompt(client: Client, deployment: FakeDeployment) -> None:
    """It changes from request to request, and would keep all that follows from being found in the prefix cache."""
    line = "x-anthropic-billing-header: cc_version=2.1.36.{}; cc_entrypoint=cli; cch={};"
    for number in range(2):
        header = {"type": "text", "text": line.format(number, number)}
        await ask(client, system=[header, {"type": "text", "text": "Be brief."}])
        await ask(client, system=f"{header['text']}\n\nBe brief.")
    assert {request.messages[0]["content"] for request in deployment.requests} == {"Be brief."}


async def test_turns_as_templates_know_them(client: Client, deployment: FakeDeployment) -> None:
    answer = await ask(
        client,
        system=[{"type": "text", "text": "One."}, {"type": "text", "text": "Two.", "cache_control": {}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
                    {"type": "redacted_thinking", "data": "xyz"},
                    {"type": "text", "text": "Looking."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "no"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "And now?"},
                    {"type": "document", "source": {"type": "text", "data": "D"}, "title": "T"},
                ],
            },
        ],
        tools=[TOOL],
    )
    assert answer.status_code == 200, answer.text
    (request,) = deployment.requests
    assert request.messages == [
        {"role": "system", "content": "One.\n\nTwo."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                }
            ],
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: no"},
        {"role": "user", "content": "And now?<document>\nT\nD\n</document>\n"},
    ]
    assert request.tools == [SHOWN]


async def test_a_last_turn_of_the_assistant_is_gone_on_with(client: Client, deployment: FakeDeployment) -> None:
    await ask(client, messages=[{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,"}])
    assert deployment.requests[0].continue_final


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({}, {}),
    ],
)
async def test_thinking_is_what_templates_call_it(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    await ask(client, **fields)
    assert deployment.requests[0].chat_template_kwargs == kwargs


def calling(deployment: FakeDeployment) -> None:
    """Thinks, says a word, calls twice, and ends."""
    deployment.scripts = [
        [
            [Delta(0, "", 1, None, Usage(7, 1, 3), reasoning="Oslo. ")],
            [Delta(0, "", 1, reasoning="And Rome."), Delta(0, "Looking.", 1)],
            [Delta(0, " Now.", 1, calls=[ToolCall("get_weather", '{"city": "Oslo"}')])],
            [Delta(0, "", 1, "tool_calls", Usage(7, 5, 3), calls=[ToolCall("get_time", "{}", "own1")])],
        ]
    ]


async def test_thinking_and_calls_in_one_piece(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    message = (await ask(client, tools=[TOOL])).json
    thinking, text, first, second = message["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Oslo. And Rome.")
    assert thinking["signature"]
    assert text == {"type": "text", "text": "Looking. Now.", "citations": None}
    assert first["id"].startswith("toolu_")
    assert (first["name"], first["input"]) == ("get_weather", {"city": "Oslo"})
    assert (second["type"], second["id"], second["name"], second["input"]) == ("tool_use", "own1", "get_time", {})
    assert message["stop_reason"] == "tool_use"


async def test_the_whole_sequence_of_events(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    answer = await ask(client, tools=[TOOL], stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        *("content_block_start", *["content_block_delta"] * 3, "content_block_stop"),
        *("content_block_start", *["content_block_delta"] * 2, "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (4, 3)
    blocks = [event for event in events if event["type"] == "content_block_start"]
    assert [block["index"] for block in blocks] == [0, 1, 2, 3]
    assert [block["content_block"]["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        *["thinking_delta"] * 2,
        "signature_delta",
        *["text_delta"] * 2,
        *["input_json_delta"] * 2,
    ]
    assert json.loads(deltas[-2]["partial_json"]) == {"city": "Oslo"}
    end = events[-2]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 5


async def test_a_stop_sequence_is_named(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "a", 1, "stop", Usage(7, 2), stop="END")]]]
    message = (await ask(client, stop_sequences=["END"])).json
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "auto"}, []),
        ({"type": "any"}, ["get_weather"]),
        ({"type": "tool", "name": "get_weather"}, ["get_weather"]),
    ],
)
async def test_what_has_to_be_called(
    client: Client, deployment: FakeDeployment, choice: dict[str, Any], names: list[str]
) -> None:
    assert (await ask(client, tools=[TOOL], tool_choice=choice)).status_code == 200
    assert deployment.requests[0].must_call == names


async def test_max_tokens_is_told(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("a", reason="length")]
    assert (await ask(client)).json["stop_reason"] == "max_tokens"


async def test_tokens_are_counted_without_generating(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "", 0, "stop", Usage(42, 0))]]]
    answer = await ask(client, "/v1/messages/count_tokens", max_tokens=..., tools=[TOOL])
    assert answer.json == {"input_tokens": 42}
    (request,) = deployment.requests
    assert request.count_only
    assert request.tools == [SHOWN]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"max_token": 3}, "max_token"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "tool_result",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"temperature": 1.5}, "temperature"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"thread": "t"}, "thread"),
        ({"fallbacks": [{"model": "x"}]}, "fallbacks"),
        ({"compaction": {}}, "compaction"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"output_config": {"format": {}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}, "x": 1}}}, "unknown field `x`"),
        ({"model": "unknown"}, "unknown"),
    ],
)
async def test_what_is_wrong_is_named_in_anthropics_shape(client: Client, fields: dict[str, Any], told: str) -> None:
    answer = await ask(client, **fields)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json
    assert error["type"] == "error"
    kind = "not_found_error" if answer.status_code == 404 else "invalid_request_error"
    assert error["error"]["type"] == kind
    assert told in error["error"]["message"]


@pytest.mark.parametrize("field", sorted(wire.HARMLESS))
async def test_hints_change_nothing(client: Client, deployment: FakeDeployment, field: str) -> None:
    assert (await ask(client, **{field: {"any": "thing"}})).status_code == 200
    assert (await ask(client)).status_code == 200
    assert deployment.requests[0] == deployment.requests[1]


async def test_errors_from_everywhere_have_that_shape(
    directory: FakeDirectory, deployment: FakeDeployment, metrics: GatewayMetrics
) -> None:
    locked = client_of(spec_of(apis=("anthropic",), api_keys=("secret",)), directory, metrics)
    refused = await ask(locked)
    assert (refused.status_code, refused.json["error"]["type"]) == (401, "authentication_error")
    openly = client_of(spec_of(apis=("anthropic",)), directory, metrics)
    assert (await openly.get("/v1/messages")).json["type"] == "error"
    deployment.scripts = [[Unavailable("loading", retry_after=3)], [[Delta(0, "a", 1)], EngineFailed("broke")]]
    loading = await ask(openly)
    assert (loading.status_code, loading.json["error"]["type"]) == (503, "overloaded_error")
    assert loading.headers["retry-after"] == "3"
    *_, last = events_of((await ask(openly, stream=True)).text)
    assert last == {"type": "error", "error": {"type": "api_error", "message": "broke"}}


def test_every_field_is_honoured_harmless_or_unsupported() -> None:
    honoured = {"messages", "model", "system", "tools", "tool_choice", "thinking", "output_config", "adapter_name"}
    honoured |= {"output_format"}
    honoured |= {"max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "min_p", "seed"}
    known = honoured | wire.HARMLESS | set(wire.UNSUPPORTED)
    assert set(wire.MessagesRequest.__struct_fields__) == known


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("model", "status"), [("chat", 200), ("nowhere", 404), (3, 400)])
async def test_every_answer_has_the_id_that_the_sdk_reads(
    client: Client, deployment: FakeDeployment, path: str, model: Any, status: int
) -> None:
    deployment.scripts = [[[Delta(0, "", 0, "stop", Usage(7, 0))]]]
    fields = {"max_tokens": ...} if path.endswith("count_tokens") else {}
    answer = await ask(client, path, model=model, **fields)
    assert answer.status_code == status
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
