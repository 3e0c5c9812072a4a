"""Rows with a grammar, through the loop: what comes out matches, and ends where the grammar does."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource, Grammar
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of(kind: Any, source: Any) -> Grammar:
    return Grammar(kind, source if isinstance(source, str) else json.dumps(source), "response_format")


@pytest.fixture(scope="module")
def driver(llama: LoadedModel) -> Driver:
    return Driver(llama, max_rows=8)


def test_ends_with_the_grammar(driver: Driver) -> None:
    """By `stop`, with no end token to be seen, whatever the model would have said next."""
    answer = driver.one(prompt=PROMPT, max_tokens=200, grammar=of("json", SCHEMA), temperature=1.0, seed=4)
    assert answer.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.tokens
    jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_a_limit_cuts_it_short(driver: Driver) -> None:
    answer = driver.one(prompt=PROMPT, max_tokens=3, grammar=of("json", SCHEMA))
    assert (answer.finish_reason, answer.tokens) == ("length", 3)


def test_complete_in_the_very_last_token_is_stop(driver: Driver) -> None:
    assert driver.one(prompt=PROMPT, max_tokens=2, grammar=of("choice", ["zq"])).finish_reason == "stop"


def test_an_open_end_is_the_models_to_choose(driver: Driver) -> None:
    """The end token is allowed where the text may end, and nowhere else."""
    biased = {"logit_bias": dict.fromkeys(driver.engine._loaded.tokenizer.eos_ids, 100.0)}
    answer = driver.one(prompt=PROMPT, max_tokens=50, grammar=of("regex", "[a-z]{3}[a-z]*"), **biased)
    assert answer.finish_reason == "stop"
    assert re.fullmatch("[a-z]{3,}", answer.text)
    assert driver.one(prompt=PROMPT, max_tokens=5, grammar=of("regex", ""), **biased).text == ""


def test_a_stop_string_may_come_first(driver: Driver) -> None:
    answer = driver.one(prompt=PROMPT, max_tokens=50, grammar=of("choice", ["one two three"]), stop=["two"])
    assert (answer.text, answer.finish_reason) == ("one ", "stop")


def test_text_that_a_stop_string_held_back_comes_out_at_the_end(driver: Driver) -> None:
    answer = driver.one(prompt=PROMPT, max_tokens=50, grammar=of("choice", ["one tw"]), stop=["two"])
    assert (answer.text, answer.finish_reason) == ("one tw", "stop")


def test_log_probabilities_are_among_what_is_allowed(driver: Driver) -> None:
    answer = driver.one(prompt=PROMPT, max_tokens=9, grammar=of("regex", "[ab]c"), logprobs=5)
    assert [len(entry.top) for entry in answer.logprobs] == [2, 1]
    assert {text for text, _, _ in answer.logprobs[0].top} == {"a", "b"}
    assert answer.logprobs[1].logprob == 0.0


def test_a_bad_grammar_is_refused_by_name(driver: Driver) -> None:
    answer = driver.one(prompt=PROMPT, grammar=of("json", {"type": "object", "propertes": {}}))
    assert answer.rejected is not None
    assert (answer.rejected.status, answer.rejected.param) == (400, "response_format")
    assert "did you mean `properties`?" in answer.rejected.reason
    assert driver.engine.rows == []


def test_neighbours_with_and_without(driver: Driver, llama: LoadedModel) -> None:
    alone = [Driver(llama).one(prompt=PROMPT[i:], max_tokens=30).text for i in range(3)]
    requests = [generate(i, prompt=PROMPT[i:], max_tokens=30) for i in range(3)]
    requests += [
        generate(10 + i, prompt=PROMPT, max_tokens=90, grammar=of("json", SCHEMA), temperature=1.0, seed=i)
        for i in range(4)
    ]
    answers = driver.run(requests)
    assert [answers[i].text for i in range(3)] == alone
    for i in range(10, 14):
        if answers[i].finish_reason == "stop":
            jsonschema.validate(json.loads(answers[i].text), SCHEMA)
    assert any(answers[i].finish_reason == "stop" for i in range(10, 14))


def test_cancelled_while_it_is_compiled(llama: LoadedModel) -> None:
    driver = Driver(llama)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=5, grammar=of("regex", "a{3}")))
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=5, grammar=of("regex", "a{3}")))
    assert not driver.engine.busy
    assert driver.engine.stats().waiting == 2
    driver.engine.cancel(1)
    answers = driver.drain()
    assert (list(answers), answers[2].text) == ([2], "aaa")
    assert driver.engine.stats().waiting == 0


def test_waiting_for_a_grammar_counts_as_waiting(llama: LoadedModel) -> None:
    driver = Driver(llama, max_queue=1)
    answers = driver.run([generate(i, prompt=PROMPT, grammar=of("regex", "ab")) for i in range(2)])
    assert answers[0].text == "ab"
    assert answers[1].rejected is not None
    assert answers[1].rejected.code == "queue_full"


def test_others_are_served_while_a_grammar_is_compiled(llama: LoadedModel) -> None:
    driver = Driver(llama)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=5, grammar=of("regex", "b{3}")))
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=2))
    while driver.engine.busy and driver.answers.get(2) is None:
        driver.engine.step()
    assert driver.answers[2].tokens
    assert driver.drain()[1].text == "bbb"


def test_a_refused_grammar_lets_go_of_the_adapter(model_folder: ModelFolder, tmp_path: Any) -> None:
    driver = Driver(load(model_folder("llama")))
    shapes = linear_shapes(driver.engine._loaded, ATTENTION)
    driver.engine.load_adapter(AdapterSource("a", str(write_mlx(tmp_path, draw(shapes, 2, 1), keys=None, scale=1.0))))
    for _ in range(2):  # compiled, and remembered
        assert driver.one(prompt=PROMPT, adapter="a", grammar=of("regex", "(")).rejected is not None
    driver.engine.drop_adapter("a")
    assert driver.engine._bank.nbytes == 0, "the last row that had it is gone"


def test_a_grammar_that_fails_ends_its_row_only(driver: Driver) -> None:
    """What takes too long for the limits is found while the text is made."""
    lark = "start: a a a a a a a a\na: /[a-z]/* | a a"
    answers = driver.run(
        [
            generate(900, prompt=PROMPT, max_tokens=400, grammar=of("lark", lark), temperature=1.0, seed=1),
            generate(901, prompt=PROMPT, max_tokens=40),
        ]
    )
    assert answers[901].finish_reason in {"stop", "length"}
    assert answers[900].finish_reason == "error"
    assert "grammar" in answers[900].error
    assert driver.engine.rows == []


# ------------------------------------------------------------------ any schema

names = st.sampled_from(["a", "b", "name", "größe", 'q"'])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        st.integers(0, 50),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["x", "é", '"']), min_size=1, max_size=3
        ),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-f]{1,4}$"},
            {"type": "string", "format": "date"},
            {"const": [1, {"k": None}]},
        ]
    ),
    st.builds(lambda step: {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 500}, st.integers(1, 20)),
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def an_object(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    objects = st.builds(an_object, st.dictionaries(names, inner, max_size=3), st.sets(names))
    arrays = st.builds(
        lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    either = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
    return objects | arrays | either


schemas = st.recursive(leaves, nested, max_leaves=5)


@given(schema=schemas, seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=list(HealthCheck))
def test_every_complete_answer_validates(driver: Driver, schema: dict[str, Any], seed: int) -> None:
    answer = driver.one(prompt=PROMPT, max_tokens=120, grammar=of("json", schema), temperature=1.5, seed=seed)
    if answer.rejected is not None:
        assert "Unsatisfiable" in answer.rejected.reason or "no text satisfies" in answer.rejected.reason
    elif answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
    else:
        assert answer.finish_reason == "length"
