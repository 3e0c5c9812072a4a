"""Every request field: honoured (it reaches the engine), harmless by name, or refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from runner.gateway.openai import wire
from runner.protocol import Generate, Sampling
from tests.gateway.conftest import Client
from tests.gateway.fakes import FakeDeployment, FakeDirectory

HONOURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 1}, {"temperature": 1.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"repetition_context_size": 64}, {"repetition_context_size": 64}),
    ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    ({"logit_bias": {"17": -100, "3": 2.5}}, {"logit_bias": {17: -100.0, 3: 2.5}}),
]


@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize(("fields", "sampling"), HONOURED)
async def test_sampling_reaches_the_engine(
    client: Client, deployment: FakeDeployment, path: str, fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    response = await getattr(client, path)(**fields)
    assert response.status_code == 200, response.text
    assert deployment.requests[0].sampling == Sampling(**sampling)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": 7, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": None, "temperature": None, "tools": None}, {}),
        ({"chat_template_kwargs": {"deep": [1]}}, {"chat_template_kwargs": {"deep": [1]}}),
    ],
)
async def test_chat_fields_reach_the_engine(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 200, response.text
    assert deployment.requests == [Generate(id=0, messages=[{"role": "user", "content": "hi"}], **expected)]


async def test_messages_reach_the_engine_as_templates_want_them(client: Client, deployment: FakeDeployment) -> None:
    received = {"audio": None, "function_call": None, "refusal": None, "tool_calls": None, "annotations": []}
    response = await client.chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": t} for t in ("hel", "lo")]},
            {"role": "assistant", "content": "hi", **received},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        ]
    )
    assert response.status_code == 200, response.text
    assert deployment.requests[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]


async def test_the_manifest_has_the_defaults_and_the_request_the_last_word(
    client: Client, directory: FakeDirectory, deployment: FakeDeployment
) -> None:
    directory.generation = {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 1024,
        "stop": ["<end>"],
        "chat_template_kwargs": {"thinking": True, "style": "short"},
    }
    await client.chat()
    await client.chat(temperature=0, max_tokens=3, stop="x", chat_template_kwargs={"thinking": False})
    await client.complete()
    defaults, overridden, completion = deployment.requests
    assert defaults.sampling == Sampling(temperature=0.7, top_p=0.9)
    assert (defaults.max_tokens, defaults.stop) == (1024, ["<end>"])
    assert defaults.chat_template_kwargs == {"thinking": True, "style": "short"}
    assert overridden.sampling == Sampling(temperature=0.0, top_p=0.9)
    assert (overridden.max_tokens, overridden.stop) == (3, ["x"])
    assert overridden.chat_template_kwargs == {"thinking": False, "style": "short"}
    assert completion.max_tokens == 1024


@pytest.mark.parametrize("field", sorted(wire.HARMLESS))
async def test_harmless_fields_change_nothing(client: Client, deployment: FakeDeployment, field: str) -> None:
    response = await client.chat(**{field: {"any": "thing"}})
    assert response.status_code == 200, response.text
    assert deployment.requests == [Generate(id=0, messages=[{"role": "user", "content": "hi"}])]


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"store": True}, "store"),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED)
async def test_what_cannot_be_honoured_is_refused_by_name(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str
) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 400
    assert response.json["error"]["param"] == param
    assert response.json["error"]["type"] == "invalid_request_error"
    assert deployment.requests == []


def test_every_unsupported_field_is_tried_above() -> None:
    tried = {param for _, param in UNSUPPORTED}
    assert set(wire.UNSUPPORTED_CHAT) <= tried


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "none"},
        {"modalities": ["text"]},
        {"store": False},
    ],
)
async def test_what_says_nothing_new_is_accepted(client: Client, fields: dict[str, Any]) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"temprature": 1}, "temprature", "did you mean `temperature`?"),
        ({"adapter": "pirate"}, "adapter", "did you mean `adapter_name`?"),
        ({"zzz": 1}, "zzz", "unknown field `zzz`"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents", "did you mean `content`?"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "did you mean `include_usage`?"),
        ({"temperature": 2.1}, "temperature", "<= 2.0"),
        ({"temperature": "hot"}, "temperature", "got `string`"),
        ({"temperature": True}, "temperature", "got `boolean`"),
        ({"top_p": -0.1}, "top_p", ">= 0"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"min_p": 1.5}, "min_p", "<= 1"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 129}, "n", "<= 128"),
        ({"seed": -1}, "seed", ">= 0"),
        ({"seed": 2**63}, "seed", "<="),
        ({"stop": ["x"] * 17}, "stop", "length <= 16"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": [1]}, "stop[0]", "got `integer`"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "got `string`"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "<= 100"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"top_logprobs": 1}, "top_logprobs", "`logprobs: true`"),
        ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", ">= -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "`stream: true`"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"chat_template_kwargs": {"n": 2**64}}, "chat_template_kwargs", "64 bits"),
        ({"model": 5}, "model", "got `integer`"),
        ({"model": "chat:pirate", "adapter_name": "shout"}, "adapter_name", "different"),
    ],
)
async def test_wrong_values_are_refused_by_name(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str, hint: str
) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json["error"]
    assert error["param"] == param
    assert hint in error["message"]
    assert deployment.requests == []


async def test_missing_messages(client: Client) -> None:
    response = await client.post("/v1/chat/completions", {"model": "chat"})
    assert (response.status_code, response.json["error"]["param"]) == (400, "messages")


def test_every_field_is_honoured_harmless_or_unsupported() -> None:
    """A field that is decoded and then forgotten would be silently ignored."""
    elsewhere = {"model", "adapter_name", "messages", "prompt", "stream", "stream_options", "n", "best_of"}
    elsewhere |= {"tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"}  # test_tools.py
    elsewhere |= {"max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs", "chat_template_kwargs"}
    elsewhere |= {"response_format", "structured_outputs", "echo"}
    sampling = {name for fields, _ in HONOURED for name in fields}
    for struct, unsupported in (
        (wire.ChatRequest, wire.UNSUPPORTED_CHAT),
        (wire.CompletionRequest, wire.UNSUPPORTED_COMPLETION),
    ):
        names = {field.name for field in msgspec.structs.fields(struct)}
        assert names - elsewhere - sampling - wire.HARMLESS - set(unsupported) == set()


async def test_parts_of_text_and_refusals_are_one_text(client: Client, deployment: FakeDeployment) -> None:
    parts = [{"type": "text", "text": "I "}, {"type": "refusal", "refusal": "will not"}]
    answer = await client.chat(messages=[{"role": "assistant", "content": parts}, {"role": "user", "content": "hi"}])
    assert answer.status_code == 200
    assert (deployment.requests[0].messages or [])[0] == {"role": "assistant", "content": "I will not"}


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}, "images"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "audio"),
        ({"type": "file", "file": {"file_id": "x"}}, "files"),
    ],
)
async def test_what_is_not_text_is_refused_by_its_kind(client: Client, part: dict[str, Any], kind: str) -> None:
    answer = await client.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])
    error = answer.json["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "messages[0].content[1]", "unsupported_content")
    assert kind in error["message"]


async def test_a_penalty_that_makes_logits_infinite_is_refused(client: Client) -> None:
    """Divided by it they are no numbers any more, and whatever a grammar allows is lost among them."""
    answer = await client.complete(repetition_penalty=5e-324)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "repetition_penalty")
