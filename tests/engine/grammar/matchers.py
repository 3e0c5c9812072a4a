"""Compiled grammars of the tiny tokenizer, without the service."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
from llguidance import LLMatcher, LLTokenizer

from runner.engine.grammar.masks import Mask
from runner.engine.grammar.matcher import RowGrammar
from runner.engine.grammar.vocabulary import grammar_vocabulary
from tests.engine.grammar.tokenizers import wrapped
from tests.engine.tiny import backend, encode

WIDTH = 420
"""Of logits: more than the tokenizer has tokens."""
END = backend().token_to_id("<|end|>")


@cache
def vocabulary() -> LLTokenizer:
    """The tiny tokenizer's."""
    return grammar_vocabulary(wrapped(backend(), "<|end|>"), WIDTH)


def regex(pattern: str, said: str = "") -> RowGrammar:
    """A row's grammar, `said` being what the row has said."""
    grammar = RowGrammar(LLMatcher(vocabulary(), LLMatcher.grammar_from_regex(pattern), log_level=0))
    for token in encode(said):
        grammar.advance(token)
    assert not grammar.error
    return grammar


def allowed_by(grammar: RowGrammar) -> set[int]:
    """What llguidance itself says may come next."""
    mask = grammar.matcher.deep_copy().compute_bitmask()
    return {token for token in range(WIDTH) if mask[token // 8] >> token % 8 & 1}


def kept(mask: Mask, rows: int, positions: int = 1) -> list[list[set[int]]]:
    """By row and position, the tokens that a mask leaves."""
    logits = mask.apply(mx.zeros((rows, positions, WIDTH)))
    return [[{t for t, v in enumerate(values) if v == 0} for values in row] for row in logits.tolist()]
