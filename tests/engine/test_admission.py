"""Requests that cannot become rows are refused with the field at fault."""

from __future__ import annotations

from typing import Any

import pytest

from runner.engine.admission import Admission
from runner.engine.loader import LoadedModel
from runner.engine.row import Row
from runner.engine.tokenizer import Tokenizer
from runner.errors import InvalidRequest
from runner.protocol import Generate
from tests.engine.drive import generate
from tests.engine.tiny import backend, encode


@pytest.fixture(scope="module")
def admission(llama: LoadedModel) -> Admission:
    return Admission(llama.tokenizer, llama.chat, llama.vocabulary)


def row(admission: Admission, max_context: int = 64, **fields: Any) -> Row:
    return admission.row(generate(1, **fields), max_context)


def test_a_prompt_of_text_gets_the_tokenizers_beginning_once(admission: Admission) -> None:
    bos = backend().token_to_id("<|bos|>")
    assert row(admission, prompt="hello").prompt == [bos, *encode("hello")]
    assert row(admission, prompt="<|bos|>hello").prompt == [bos, *encode("hello")]
    assert row(admission, prompt=[5, 6]).prompt == [5, 6]


def test_messages_are_rendered_with_no_second_beginning(admission: Admission) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert row(admission, messages=messages).prompt == encode("<|bos|><|user|>hello<|end|>\n<|assistant|>")
    open_end = row(admission, messages=messages, chat_template_kwargs={"add_generation_prompt": False}).prompt
    assert open_end == encode("<|bos|><|user|>hello<|end|>\n")


@pytest.mark.parametrize(("asked", "max_context", "given"), [(0, 64, 61), (5, 64, 5), (100, 64, 61), (100, 0, 100)])
def test_the_answer_fits_the_context(admission: Admission, asked: int, max_context: int, given: int) -> None:
    assert row(admission, max_context, prompt=[5, 6, 7], max_tokens=asked).max_tokens == given


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({}, "messages", "either messages or prompt"),
        ({"messages": [], "prompt": "x"}, "messages", "either messages or prompt"),
        ({"messages": []}, "messages", "empty"),
        ({"prompt": []}, "prompt", "no tokens"),
        ({"prompt": [1, 10_000]}, "prompt", "token 10000"),
        ({"prompt": [-1]}, "prompt", "token -1"),
        ({"prompt": [5] * 64}, "prompt", "has 64 tokens, and the model's context holds 64"),
        ({"messages": [{"role": "user", "content": "word " * 90}]}, "messages", "context holds 64"),
        ({"prompt": "x", "logit_bias": {99_999: 1.0}}, "logit_bias", "token 99999"),
        ({"prompt": "x", "repetition_penalty": 0.0}, "repetition_penalty", "greater than 0"),
        ({"prompt": "x", "temperature": -0.5}, "temperature", "0 or greater"),
        ({"prompt": "x", "seed": 1 << 80}, "seed", "64 bits"),
    ],
)
def test_refusals_name_the_field(admission: Admission, fields: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as error:
        row(admission, **fields)
    assert error.value.param == param
    if "context holds" in reason:
        assert error.value.code == "context_length_exceeded"


def test_rows_without_a_seed_get_different_ones(admission: Admission) -> None:
    seeds = {admission.row(Generate(id=i, prompt="x"), 64).seed for i in range(50)}
    assert len(seeds) == 50
    assert row(admission, prompt="x", seed=-3).seed == -3


@pytest.mark.parametrize(
    "fields", [{"prompt": "a b " * 300_000}, {"messages": [{"role": "user", "content": "ab" * 999_999}]}]
)
def test_a_text_that_is_far_too_long_is_not_read_to_its_end(
    admission: Admission, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Sixteen megabytes take ten seconds, in which no other request gets a token."""
    read: list[int] = []
    monkeypatch.setattr(Tokenizer, "encode_rendered", lambda _, text: read.append(len(text)) or [1] * (len(text) // 4))
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda _, text: read.append(len(text)) or [1] * (len(text) // 4))
    for work in (lambda: row(admission, **fields), lambda: admission.counted(generate(1, **fields), 64)):
        with pytest.raises(InvalidRequest, match=r"more tokens than the 64 that the model's context holds") as refusal:
            work()
        assert (refusal.value.param, refusal.value.code) == (next(iter(fields)), "context_length_exceeded")
    assert read == [1 << 20, 1 << 20]
    assert admission.counted(generate(1, **fields), 0).usage is not None, "a model without a limit"
    assert read[-1] > 1 << 20


@pytest.mark.parametrize(("asked", "max_context", "held"), [(2, 64, 2), (2**31 - 1, 64, 64), (2**31 - 1, 0, 1 << 17)])
def test_a_window_for_repetitions_is_no_wider_than_the_row_gets_long(
    admission: Admission, asked: int, max_context: int, held: int
) -> None:
    """The batch holds the whole window for each row: two thousand million places would be the end of the machine."""
    made = row(admission, max_context, prompt=[5, 6, 7], repetition_penalty=1.1, repetition_context_size=asked)
    assert made.sampling.repetition_context_size == held
    short = row(admission, 64, prompt=[5, 6, 7], max_tokens=2, repetition_context_size=asked)
    assert short.sampling.repetition_context_size == min(asked, 5)


@pytest.mark.parametrize(("asked", "made"), [(0.0, 0.0), (5e-324, 0.0), (1e-45, 0.0), (1e-6, 1e-6), (0.7, 0.7)])
def test_temperatures_that_no_logits_can_be_divided_by_are_greedy(
    admission: Admission, asked: float, made: float
) -> None:
    assert row(admission, prompt=[5, 6, 7], temperature=asked).sampling.temperature == made


def test_more_messages_than_the_context_has_tokens_are_not_rendered(admission: Admission) -> None:
    messages = [{"role": "user", "content": ""}] * 65
    with pytest.raises(InvalidRequest, match="65 messages, more than the 64 tokens") as refusal:
        row(admission, messages=messages)
    assert (refusal.value.param, refusal.value.code) == ("messages", "context_length_exceeded")
