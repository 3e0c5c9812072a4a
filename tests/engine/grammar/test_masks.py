"""Masks of all rows at once are llguidance's own, row by row."""

from __future__ import annotations

from math import inf, nan

import mlx.core as mx
import pytest

from runner.engine.grammar import masks as module
from runner.engine.grammar.masks import GrammarMasks
from runner.engine.grammar.matcher import RowGrammar
from runner.engine.sampling import Sampler, SamplingRow
from runner.protocol import Sampling
from tests.engine.grammar.matchers import END, WIDTH, allowed_by, kept, regex
from tests.engine.tiny import encode

EVERYTHING = set(range(WIDTH))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_each_row_has_its_own(count: int) -> None:
    """Few rows and many go different ways."""
    patterns = [("[a-z]+x", "ab"), ("[0-9]{3}", ""), ("forced text", "for")] * 3
    rows = [regex(pattern, said) for pattern, said in patterns[:count]]
    mask = GrammarMasks(WIDTH).next(rows)
    assert mask is not None
    assert mask.rows is None
    assert kept(mask, count) == [[allowed_by(grammar)] for grammar in rows]


def test_rows_without_a_grammar_are_not_touched() -> None:
    grammar = regex("[0-9]+")
    mask = GrammarMasks(WIDTH).next([None, grammar, None])
    assert mask is not None
    logits = mx.random.normal((3, 1, WIDTH))
    before = logits.tolist()
    after = mask.apply(logits)
    assert logits.tolist() == before
    assert after[0].tolist() == before[0]
    assert after[2].tolist() == before[2]
    assert {t for t, v in enumerate(after[1, 0].tolist()) if v != -float("inf")} == allowed_by(grammar)
    assert [v for v in after[1, 0].tolist() if v != -float("inf")] == [
        before[1][0][t] for t in sorted(allowed_by(grammar))
    ]


def test_no_grammar_no_mask() -> None:
    assert GrammarMasks(WIDTH).next([None, None]) is None


def test_an_ended_grammar_needs_no_mask() -> None:
    ended = regex("ab", "ab")
    assert ended.ended
    assert not ended.error
    assert GrammarMasks(WIDTH).next([ended]) is None


def test_drafted_tokens_get_a_mask_each_and_nothing_changes() -> None:
    long, short, wrong = regex("[0-9]+x"), regex("ab?c?", "a"), regex("[a-z]+")
    before = [allowed_by(grammar) for grammar in (long, short, wrong)]
    digits = encode("1") + encode("2")
    mask = GrammarMasks(WIDTH).drafted([(0, long, digits), (2, short, [*encode("b"), END]), (3, wrong, encode("7"))], 3)
    assert mask is not None
    found = kept(mask, 4, 3)
    assert found[0] == [allowed_by(regex("[0-9]+x", said)) for said in ("", "1", "12")]
    assert found[1] == [EVERYTHING] * 3
    assert found[2][:2] == [allowed_by(regex("ab?c?", "a")), allowed_by(regex("ab?c?", "ab"))]
    assert found[3] == [allowed_by(regex("[a-z]+")), EVERYTHING, EVERYTHING]
    assert [allowed_by(grammar) for grammar in (long, short, wrong)] == before


def test_a_masked_row_samples_what_is_allowed_whatever_else_it_asks_for() -> None:
    ways = [
        Sampling(),
        Sampling(temperature=2.0, top_p=0.5, seed=1),
        Sampling(temperature=2.0, top_k=300, min_p=0.0001),
        Sampling(temperature=1.0, logit_bias={END: 100.0}, repetition_penalty=1.5, presence_penalty=1.0),
    ]
    rows = [SamplingRow(way, 3, [1], [], False) for way in ways]
    mask = GrammarMasks(WIDTH).next([regex("[0-9]") for _ in ways])
    logits = mx.random.normal((len(ways), WIDTH)) * 3
    tokens, _ = Sampler(rows, WIDTH)(logits, mx.zeros((len(ways),), dtype=mx.uint32), mask)
    assert set(tokens.tolist()) <= allowed_by(regex("[0-9]"))


@pytest.mark.parametrize("wrong", [inf, nan])
def test_what_is_not_allowed_is_left_out_even_if_it_is_no_number(wrong: float) -> None:
    """In rows of a batch and in all of them; what is allowed stays as it is."""
    allowed = allowed_by(regex("[0-9]"))
    logits = mx.array([[[0.5 if token in allowed else wrong for token in range(WIDTH)]]] * 2)
    for rows in ([regex("[0-9]"), None], [regex("[0-9]"), regex("[0-9]")]):
        mask = GrammarMasks(WIDTH).next(rows)
        assert mask is not None
        first, other = mask.apply(logits)
        assert {t for t, v in enumerate(first[0].tolist()) if v == 0.5} == allowed
        assert set(first[0].tolist()) == {0.5, -inf}
        assert mx.array_equal(other, logits[1], equal_nan=True).item() == (rows[1] is None)


@pytest.mark.parametrize("wrong", [inf, nan, -inf])
def test_a_row_that_can_choose_none_chooses_what_its_grammar_does_not_take(wrong: float) -> None:
    allowed = allowed_by(regex("[0-9]"))
    among = mx.array([[[wrong if token == max(allowed) or wrong == -inf else 0.5 for token in range(WIDTH)]]])
    rows = mx.concatenate([among, mx.zeros_like(among)])
    mask = GrammarMasks(WIDTH).next([regex("[0-9]"), regex("[0-9]")])
    assert mask is not None
    none, healthy = mask.apply(rows)
    assert {t for t, v in enumerate(none[0].tolist()) if v > -inf} == EVERYTHING - allowed
    assert {t for t, v in enumerate(healthy[0].tolist()) if v > -inf} == allowed


def test_half_precision_stays() -> None:
    mask = GrammarMasks(WIDTH).next([regex("a"), None])
    assert mask is not None
    assert mask.apply(mx.zeros((2, 1, WIDTH), dtype=mx.bfloat16)).dtype == mx.bfloat16


def test_a_grammar_that_holds_up_the_others_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no patience at all, its first mask is one too many."""
    monkeypatch.setattr(module, "USUAL", 0.0)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    slow, other = regex("[a-z]+"), regex("[a-z]+")
    masks = GrammarMasks(WIDTH)
    masks.next([slow])
    assert slow.ended
    assert "too ambiguous" in slow.error
    assert not other.ended
    assert masks.next([slow, None]) is None


def test_many_rows_are_looked_at_one_by_one_once_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars: list[RowGrammar | None] = [regex("[a-z]+") for _ in range(8)]
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "USUAL", 0.0)
    masks = GrammarMasks(WIDTH)
    masks.next(grammars)
    assert not any(grammar is not None and grammar.ended for grammar in grammars), "nobody knows whose time it was"
    monkeypatch.setattr(module, "_SUSPICIOUS", 0.0)
    masks.next(grammars)
    masks.next(grammars)
    assert all(grammar is not None and grammar.ended for grammar in grammars)
