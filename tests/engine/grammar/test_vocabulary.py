"""Tokens as llguidance sees them are the bytes that the detokenizer writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from llguidance import LLMatcher, LLTokenizer

from runner.engine import tokenizer as engine_tokenizer
from runner.engine.grammar.vocabulary import NoGrammars, grammar_vocabulary
from tests.engine.grammar.tokenizers import sentencepiece, word_piece, wrapped
from tests.engine.tiny import backend

KINDS: dict[str, Callable[[], engine_tokenizer.Tokenizer]] = {
    "byte level": lambda: wrapped(backend(), "<|end|>"),
    "byte fallback": lambda: wrapped(sentencepiece(), "</s>"),
}


def matcher(vocabulary: LLTokenizer, lark: str) -> LLMatcher:
    found = LLMatcher(vocabulary, lark, log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def allowed(one: LLMatcher) -> set[int]:
    mask = one.compute_bitmask()
    return {token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_allowed_token_continues_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert tokenizer.bytes_of is not None
    vocabulary = grammar_vocabulary(tokenizer, tokenizer.vocab_size + 100)
    at_start = allowed(matcher(vocabulary, "start: /.*/"))
    readable = {
        token
        for token in range(tokenizer.vocab_size)
        if token not in tokenizer.bytes_of.special and (data := tokenizer.bytes_of[token]) and b"\n" not in data
    }
    # One byte of a character may be a token; which of them can begin one is UTF-8's business.
    assert {token for token in at_start if tokenizer.bytes_of[token].isascii()} - tokenizer.eos_ids == {
        token for token in readable if tokenizer.bytes_of[token].isascii()
    }
    assert at_start >= tokenizer.eos_ids
    assert max(at_start) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_text_is_spelled_as_the_tokenizer_would(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert tokenizer.bytes_of is not None
    one = matcher(grammar_vocabulary(tokenizer, tokenizer.vocab_size), "start: " + '"name\\nname größe" "!"')
    said = []
    while not one.is_stopped():
        token = min(allowed(one))
        assert one.consume_token(token)
        said.append(token)
    detokenizer = tokenizer.detokenizer()
    assert "".join(map(detokenizer.add, said)) + detokenizer.flush() == "name\nname größe!"
    assert tokenizer.bytes_of[said[0]] == (b"name" if kind == "byte fallback" else b"n")


def test_a_forced_text_that_spells_a_special_token_is_text() -> None:
    tokenizer = KINDS["byte level"]()
    assert tokenizer.bytes_of is not None
    one = matcher(grammar_vocabulary(tokenizer, tokenizer.vocab_size), 'start: "<|end|> is not the end"')
    said = []
    while not one.is_stopped():
        token = min(allowed(one))
        assert one.consume_token(token)
        said.append(token)
    assert not tokenizer.eos_ids & set(said)
    assert b"".join(tokenizer.bytes_of[token] for token in said) == b"<|end|> is not the end"


def test_a_special_token_can_be_named_by_a_grammar() -> None:
    tokenizer = KINDS["byte level"]()
    one = matcher(grammar_vocabulary(tokenizer, tokenizer.vocab_size), 'start: <|user|> "a"')
    assert allowed(one) == {backend().token_to_id("<|user|>")}


def test_a_model_without_end_tokens() -> None:
    tokenizer = wrapped(backend(), "")
    one = matcher(grammar_vocabulary(tokenizer, tokenizer.vocab_size), 'start: "a"')
    assert one.consume_token(backend().token_to_id("a"))
    assert one.is_stopped()
    assert not one.is_error()


def test_tokens_that_are_no_bytes() -> None:
    with pytest.raises(NoGrammars, match="bytes"):
        grammar_vocabulary(wrapped(word_piece(), ""), 200)
