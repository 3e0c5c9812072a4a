"""Tools, calls and reasoning in OpenAI's chat: what goes to the engine, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from runner.protocol import Delta, ToolCall, Usage
from tests.gateway.conftest import Client, events_of
from tests.gateway.fakes import FakeDeployment

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
OSLO = ToolCall("get_weather", '{"city": "Oslo"}')
TIME = ToolCall("get_time", "{}", "own1")


def calling(deployment: FakeDeployment) -> None:
    """Thinks, says a word, calls twice, and ends."""
    deployment.scripts = [
        [
            [Delta(0, "", 1, reasoning="Oslo. ")],
            [Delta(0, "", 1, reasoning="And Rome."), Delta(0, "Looking.", 1)],
            [Delta(0, "", 1, calls=[OSLO])],
            [
                Delta(
                    0, "", 1, "tool_calls", Usage(7, 5, reasoning_tokens=2), calls=[ToolCall("get_time", "{}", "own1")]
                )
            ],
        ]
    ]


async def test_tools_reach_the_engine_as_they_are(client: Client, deployment: FakeDeployment) -> None:
    response = await client.chat(tools=[TOOL, OTHER], parallel_tool_calls=False)
    assert response.status_code == 200, response.text
    (request,) = deployment.requests
    assert request.tools == [TOOL, OTHER]
    assert not request.parallel_tool_calls


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("auto", []),
        ("required", ["get_weather", "get_time"]),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
    ],
)
async def test_what_has_to_be_called(client: Client, deployment: FakeDeployment, choice: Any, names: list[str]) -> None:
    assert (await client.chat(tools=[TOOL, OTHER], tool_choice=choice)).status_code == 200
    assert deployment.requests[0].must_call == names


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
async def test_without_a_choice_nothing_is_shown(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any]
) -> None:
    response = await client.chat(**{"tools": [TOOL], **fields})
    assert response.status_code == 200, response.text
    assert deployment.requests[0].tools is None


async def test_calls_in_one_piece(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    choice = (await client.chat(tools=[TOOL, OTHER])).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["reasoning_content"] == "Oslo. And Rome."
    assert message["content"] == "Looking."
    first, second = message["tool_calls"]
    assert first["id"].startswith("call_")
    assert first["type"] == "function"
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert second["id"] == "own1"


async def test_a_message_that_only_calls_has_no_content(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "", 1, "tool_calls", Usage(7, 1), calls=[OSLO])]]]
    message = (await client.chat(tools=[TOOL])).json["choices"][0]["message"]
    assert message["content"] is None


async def test_calls_in_a_stream(client: Client, deployment: FakeDeployment) -> None:
    calling(deployment)
    response = await client.chat(tools=[TOOL, OTHER], stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response.text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["Oslo. ", "And Rome."]
    assert [d["content"] for d in deltas[1:] if "content" in d] == ["Looking."]
    calls = [call for d in deltas for call in d.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "get_weather"), (1, "get_time")]
    assert calls[0]["function"]["arguments"] == OSLO.arguments
    assert calls[1]["id"] == "own1"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_past_calls_and_results_reach_the_template(client: Client, deployment: FakeDeployment) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    response = await client.chat(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [{**call, "index": 0}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        tools=[TOOL],
    )
    assert response.status_code == 200, response.text
    assert deployment.requests[0].messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]}, "tools[0].function.paramters"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ],
)
async def test_what_is_wrong_is_named(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str
) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json["error"]["param"].startswith(param)
    assert deployment.requests == []


@pytest.mark.parametrize(
    ("effort", "expected"), [("none", {"enable_thinking": False}), ("high", {"reasoning_effort": "high"})]
)
async def test_reasoning_effort_is_what_templates_call_it(
    client: Client, deployment: FakeDeployment, effort: str, expected: dict[str, Any]
) -> None:
    await client.chat(reasoning_effort=effort)
    assert deployment.requests[0].chat_template_kwargs == expected


@pytest.mark.parametrize(("mode", "must"), [("auto", []), ("required", ["b"])])
async def test_allowed_tools_are_those_that_the_model_sees(
    client: Client, deployment: FakeDeployment, mode: str, must: list[str]
) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools[1:]}}
    assert (await client.chat(tools=tools, tool_choice=allowed)).status_code == 200
    flat = [{"type": "function", "name": name} for name in ("a", "b")]
    choice = {"type": "allowed_tools", "mode": mode, "tools": flat[1:]}
    body = {"model": "chat", "input": "hi", "tools": flat, "tool_choice": choice}
    assert (await client.post("/v1/responses", body)).status_code == 200
    for asked in deployment.requests:
        assert ([tool["function"]["name"] for tool in asked.tools or ()], asked.must_call) == (["b"], must)
    refused = await client.chat(tools=tools[:1], tool_choice=allowed)
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "tool_choice")
