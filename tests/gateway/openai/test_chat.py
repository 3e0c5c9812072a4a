from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runner.errors import EngineFailed, InvalidRequest, Unavailable
from runner.protocol import Delta, Usage
from tests.gateway.conftest import Client, events_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory, logprob, text_script


async def test_whole_answer(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("Hel", "lo", usage=Usage(9, 2, 4))]
    answer = (await client.chat()).json
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "chat",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 2,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
        "system_fingerprint": "fp_base",
    }


async def test_stream_is_role_then_text_then_reason_then_done(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("Hel", "", "lo", reason="length")]
    response = await client.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    heads = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}
    assert len(heads) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_last_when_asked_for(client: Client) -> None:
    response = await client.chat(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events_of(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_deltas_that_come_together_are_one_chunk(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "a", 1), Delta(0, "b", 1), Delta(0, "c", 1, "stop", Usage(1, 3))]]]
    *chunks, _ = events_of((await client.chat(stream=True)).text)
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "abc", None]
    whole = (await client.chat()).json
    assert whole["choices"][0]["message"]["content"] == "abc"


@pytest.mark.parametrize(
    "text", ["grüße 漢字 🏴‍☠️", 'quote " and \\', "line\nbreak\r\n", "\u2028\u2029\x85\x0b\x0c\x00"]
)
async def test_any_text_survives_and_stays_on_one_line(client: Client, deployment: FakeDeployment, text: str) -> None:
    deployment.scripts = [text_script(text)]
    streamed = (await client.chat(stream=True)).text
    assert len(streamed.splitlines()) == streamed.count("\n"), "clients may split with str.splitlines"
    assert events_of(streamed)[1]["choices"][0]["delta"]["content"] == text
    assert (await client.chat()).json["choices"][0]["message"]["content"] == text


async def test_n_choices_have_their_own_seeds_and_the_prompt_counts_once(
    client: Client, deployment: FakeDeployment
) -> None:
    deployment.scripts = [text_script(t, usage=Usage(5, 2, 1)) for t in ("one", "two", "three")]
    answer = (await client.chat(n=3, seed=40)).json
    assert sorted(c["message"]["content"] for c in answer["choices"]) == ["one", "three", "two"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed or 0 for request in deployment.requests) == [40, 41, 42]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 6)
    assert (deployment.opened, deployment.closed) == (3, 3)


async def test_n_choices_stream_each_to_its_end(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("a", "b"), text_script("c"), text_script("d", "e", "f")]
    response = await client.chat(n=3, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response.text)
    texts = {0: "", 1: "", 2: ""}
    reasons: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert not reasons[choice["index"]], "nothing follows a finish reason"
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert sorted(texts.values()) == ["ab", "c", "def"]
    assert reasons == {0: ["stop"], 1: ["stop"], 2: ["stop"]}
    assert usage["usage"]["completion_tokens"] == 6
    assert done == "[DONE]"


async def test_logprobs(client: Client, deployment: FakeDeployment) -> None:
    entry = logprob("é", -0.25, ("é", -0.25), ("e", -1.5))
    script = [[Delta(0, "é", 1, None, None, [entry])], [Delta(0, "", 0, "stop", Usage(1, 1))]]
    expected = {
        "content": [
            {
                "token": "é",
                "logprob": -0.25,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.25, "bytes": [195, 169]},
                    {"token": "e", "logprob": -1.5, "bytes": [101]},
                ],
            }
        ],
        "refusal": None,
    }
    deployment.scripts = [script]
    whole = (await client.chat(logprobs=True, top_logprobs=2)).json
    assert whole["choices"][0]["logprobs"] == expected
    *chunks, _ = events_of((await client.chat(logprobs=True, top_logprobs=2, stream=True)).text)
    assert chunks[1]["choices"][0]["logprobs"] == expected
    assert [request.sampling.logprobs for request in deployment.requests] == [2, 2]


async def test_logprobs_without_alternatives_and_without_logprobs(client: Client, deployment: FakeDeployment) -> None:
    await client.chat(logprobs=True)
    await client.chat(logprobs=False)
    await client.chat()
    assert [request.sampling.logprobs for request in deployment.requests] == [0, None, None]


async def test_adapter_by_name_and_by_model_id(
    client: Client, directory: FakeDirectory, deployment: FakeDeployment
) -> None:
    by_name = await client.chat(adapter_name="pirate")
    by_id = await client.chat(model="chat:shout")
    plain = await client.chat()
    assert [request.adapter for request in deployment.requests] == ["key-pirate", "key-shout", ""]
    assert [r.headers.get("x-mlx-run-adapter") for r in (by_name, by_id, plain)] == ["pirate", "shout", None]
    assert (by_name.json["model"], by_id.json["model"]) == ("chat", "chat:shout"), "the requested id comes back"
    assert by_id.json["system_fingerprint"] == "fp_shout"
    assert directory.lookups[0] == ("lm", "chat", "pirate")


async def test_a_refusal_before_the_first_token_has_its_status(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [
        [Unavailable("`chat` is loading", retry_after=2.4, code="loading")],
        [InvalidRequest("the prompt has 9000 tokens, the context 4096", param="messages", code="context_length")],
        [EngineFailed("the engine died while it worked on this request")],
        [[Delta(0, "", 0, "error", None, None, "out of memory")]],
        [[Delta(0, "", 0, "cancelled")]],
        [],
    ]
    loading = await client.chat(stream=True)
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "3")
    assert loading.json["error"] == {
        "message": "`chat` is loading", "type": "server_error", "param": None, "code": "loading"
    }  # fmt: skip
    too_long = await client.chat(stream=True)
    assert (too_long.status_code, too_long.json["error"]["param"]) == (400, "messages")
    for message in ("died", "out of memory", "cancelled", "before it was complete"):
        failed = await client.chat(stream=True)
        assert failed.status_code == 500
        assert message in failed.json["error"]["message"]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (EngineFailed("the engine died"), "the engine died"),
        ([Delta(0, "", 0, "error", None, None, "out of memory")], "out of memory"),
        (RuntimeError("a secret of ours"), "internal error"),
    ],
)
async def test_an_error_after_the_first_token_is_an_event_and_no_done_follows(
    client: Client, deployment: FakeDeployment, end: Any, message: str
) -> None:
    deployment.scripts = [[[Delta(0, "Hel", 1)], end]]
    response = await client.chat(stream=True)
    assert response.status_code == 200
    *_, last = events_of(response.text)
    assert message in last["error"]["message"]
    assert "secret" not in response.text
    assert deployment.closed == 1
    whole = await client.chat()
    assert whole.status_code == 500
    assert message in whole.json["error"]["message"]


async def test_one_failing_choice_ends_the_others(client: Client, deployment: FakeDeployment) -> None:
    never = asyncio.Event()
    deployment.scripts = [
        [[Delta(0, "a", 1)], never],
        [[Delta(0, "b", 1)], EngineFailed("the engine died")],
    ]
    *_, last = events_of((await client.chat(n=2, stream=True)).text)
    assert last["error"]["message"] == "the engine died"
    assert (deployment.opened, deployment.closed) == (2, 2)
