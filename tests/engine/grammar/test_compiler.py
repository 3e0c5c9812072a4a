"""Grammars are compiled, or refused with the field and the reason, in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from runner.engine.grammar.compiler import GrammarCompiler
from runner.engine.loader import LoadedModel
from runner.errors import InvalidRequest
from runner.protocol import Grammar
from tests.engine.tiny import encode


@pytest.fixture(scope="module")
def compiler(llama: LoadedModel) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(llama.tokenizer, llama.vocabulary)
    yield made
    made.close()


def of(kind: Any, source: Any) -> Grammar:
    return Grammar(kind, source if isinstance(source, str) else json.dumps(source), "the.field")


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar).deep_copy()
    return bool(matcher.try_consume_tokens(encode(text)) == len(encode(text)) and matcher.is_accepting())


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
MATCHES: list[tuple[Grammar, list[str], list[str]]] = [
    (
        of("json", OBJECT),
        ['{"a":1}', '{"a": 1, "b": "x"}', '{\n  "a": 1,\n  "c": [true]\n}', '{\n\t"a": -5\n}'],
        ["{}", '{"b":"x"}', '{"a":"1"}', '{"a":  1}', ' {"a":1}', '{"a":1} ', "[]"],
    ),
    (of("json", OBJECT | {"additionalProperties": False}), ['{"a":1}'], ['{"a":1,"c":2}']),
    (of("regex", r"\d{2}-[a-f]+"), ["12-f", "00-abc"], ["1-f", "12-g", "x12-f"]),
    (of("regex", "^(yes|no)$"), ["yes", "no"], ["maybe", "yesno"]),
    (of("lark", 'start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "y"]),
    (of("choice", ["yes", 'q"uo\\te', "größe\n2"]), ["yes", 'q"uo\\te', "größe\n2"], ["no", "größe"]),
    (of("choice", ["a", "ab"]), ["a", "ab"], ["b", "aab"]),
    (of("choice", [f"entry {i}" for i in range(20_000)]), ["entry 0", "entry 17", "entry 19999"], ["entry", "entry x"]),
    (of("json", {"oneOf": [{"type": "integer"}, {"type": "null"}]}), ["3", "null"], ['"x"']),
]


@pytest.mark.parametrize(("grammar", "matching", "others"), MATCHES)
def test_what_is_accepted(compiler: GrammarCompiler, grammar: Grammar, matching: list[str], others: list[str]) -> None:
    assert {text: accepts(compiler, grammar, text) for text in matching} == dict.fromkeys(matching, True)
    assert {text: accepts(compiler, grammar, text) for text in others} == dict.fromkeys(others, False)


REFUSED: list[tuple[Grammar, str]] = [
    (of("json", '{"type": '), "not valid JSON"),
    (of("json", "[" * 20_000), "not valid JSON"),
    (of("json", "[1]"), "a JSON Schema is an object"),
    (of("json", {"type": "strnig"}), "Invalid type: strnig"),
    (of("json", {"type": "string", "not": {"const": "x"}}), 'Unimplemented keys: ["not"]'),
    (of("json", {"items": {"uniqueItems": True}}), "uniqueItems"),
    (of("json", {"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
    (of("json", {"type": "object", "propertis": {}}), "propertis: unknown keyword; did you mean `properties`"),
    (of("json", {"type": "string", "format": "phone"}), "Unknown format: phone"),
    (of("json", {"type": "string", "pattern": "a(?=b)"}), "look-ahead"),
    (of("json", {"$ref": "https://example.com/schema"}), "https://example.com/schema"),
    (of("json", {"$ref": "#"}), "no text satisfies"),
    (of("json", {"enum": []}), "Unsatisfiable"),
    (of("json", {"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    (of("json", '{"type": "integer", "minimum": 1e999}'), "number out of range"),
    (of("regex", "(a"), "unclosed group"),
    (of("regex", r"[^\x00-\U0010FFFF]"), "no text satisfies"),
    (of("lark", "start: x"), 'unknown name: "x"'),
    (of("lark", "nothing"), "Expected token"),
]


@pytest.mark.parametrize(("grammar", "reason"), REFUSED)
def test_refusals_name_the_field_and_the_reason(compiler: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(grammar)
    assert refused.value.param == "the.field"
    assert refused.value.message.startswith("`the.field`: ")
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


def intersection(patterns: int) -> Grammar:
    """A kilobyte whose automaton has about 2 ** patterns states."""
    parts = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(1, patterns)]
    return of("json", {"allOf": parts})


def test_a_hostile_grammar_costs_its_deadline_and_the_next_one_works(llama: LoadedModel) -> None:
    compiler = GrammarCompiler(llama.tokenizer, llama.vocabulary, trial_seconds=1.0)
    try:
        compiler.compile(of("regex", "a"))
        started = time.monotonic()
        with pytest.raises(InvalidRequest, match="takes more than 1 seconds to compile"):
            compiler.compile(intersection(30))
        assert time.monotonic() - started < 10
        assert accepts(compiler, of("regex", "b"), "b")
    finally:
        compiler.close()
