from __future__ import annotations

from typing import Any

import pytest

from runner.protocol import Delta, Generate, Usage
from tests.gateway.conftest import Client, events_of
from tests.gateway.fakes import FakeDeployment, logprob, text_script


async def test_whole_answer(client: Client, deployment: FakeDeployment) -> None:
    answer = (await client.complete()).json
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "chat",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "system_fingerprint": "fp_base",
    }
    assert deployment.requests == [Generate(id=0, prompt="once", max_tokens=16)]


async def test_usage_tells_what_a_draft_model_proposed(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [
        text_script("Hello", usage=Usage(7, 6, 3, 4, 2)),
        text_script("you", usage=Usage(7, 3, 3, 1, 0)),
    ]
    answer = (await client.complete(prompt=["a", "b"])).json
    assert answer["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 5,
        "rejected_prediction_tokens": 2,
    }


async def test_stream(client: Client) -> None:
    *chunks, done = events_of((await client.complete(stream=True)).text)
    assert done == "[DONE]"
    assert [c["choices"][0]["text"] for c in chunks] == ["Hello", " world", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert {c["object"] for c in chunks} == {"text_completion"}


async def test_a_stream_may_begin_with_half_a_character(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("", "é")]
    *chunks, done = events_of((await client.complete(stream=True)).text)
    assert done == "[DONE]"
    assert [c["choices"][0]["text"] for c in chunks] == ["é", ""]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [4]], ["a", [4]]),
    ],
)
async def test_prompts(client: Client, deployment: FakeDeployment, prompt: Any, prompts: list[Any]) -> None:
    answer = (await client.complete(prompt=prompt, max_tokens=4)).json
    assert [request.prompt for request in deployment.requests] == prompts
    assert len(answer["choices"]) == len(prompts)
    assert answer["usage"]["prompt_tokens"] == 7 * len(prompts)


async def test_choices_of_several_prompts_are_grouped_by_prompt(client: Client, deployment: FakeDeployment) -> None:
    await client.complete(prompt=["a", "b"], n=2, best_of=2, seed=5)
    assert [(r.prompt, r.sampling.seed) for r in deployment.requests] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]


async def test_logprobs_are_parallel_lists(client: Client, deployment: FakeDeployment) -> None:
    first, second = logprob("On", -0.5, ("On", -0.5)), logprob("ce", -1.0, ("ce", -1.0), ("ly", -2.0))
    deployment.scripts = [
        [[Delta(0, "On", 1, None, None, [first])], [Delta(0, "ce", 1, "stop", Usage(1, 2), [second])]]
    ]
    whole = (await client.complete(logprobs=2)).json["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["On", "ce"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"On": -0.5}, {"ce": -1.0, "ly": -2.0}],
        "text_offset": [0, 2],
    }
    *chunks, _ = events_of((await client.complete(logprobs=2, stream=True)).text)
    assert [c["choices"][0]["logprobs"] and c["choices"][0]["logprobs"]["text_offset"] for c in chunks] == [
        [0],
        [2],
        None,
    ]
    assert deployment.requests[0].sampling.logprobs == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ],
)
async def test_wrong_values_are_refused_by_name(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str
) -> None:
    response = await client.complete(**fields)
    assert response.status_code == 400, response.text
    assert response.json["error"]["param"] == param
    assert deployment.requests == []


async def test_what_says_nothing_new_is_accepted(client: Client, deployment: FakeDeployment) -> None:
    deployment.scripts = [text_script("x")]
    response = await client.complete(echo=False, suffix="", best_of=1)
    assert response.status_code == 200, response.text


async def test_echo_puts_the_prompt_before_its_answers(client: Client) -> None:
    prompts = ["once", "twice \u2028"]
    whole = (await client.complete(echo=True, prompt=prompts, n=2)).json
    expected = [f"{prompt}Hello world" for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in whole["choices"]] == expected
    *chunks, _ = events_of((await client.complete(echo=True, prompt=prompts, n=2, stream=True)).text)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == expected
