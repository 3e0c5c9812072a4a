"""All rows at once against one row at a time in numpy, and against upstream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p

from runner.engine.draw import key_of
from runner.engine.sampling import Sampler, SamplingRow, most_likely
from runner.protocol import Sampling

VOCABULARY = 64


def logits_of(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> mx.array:
    return mx.random.normal((rows, vocabulary), key=mx.random.key(seed)) * 2


def row(
    key: int = 1, prompt: Sequence[int] = (0,), generated: Sequence[int] | None = None, **fields: Any
) -> SamplingRow:
    return SamplingRow(Sampling(**fields), key, prompt, generated or (), generated is not None)


def sample(rows: list[SamplingRow], logits: mx.array, fed: Sequence[int] | None = None) -> list[int]:
    sampler = Sampler(rows, logits.shape[-1])
    tokens, _ = sampler(logits, mx.array(fed or [0] * len(rows), dtype=mx.uint32))
    return tokens.tolist()


def test_greedy_rows_are_the_argmax_beside_any_neighbours() -> None:
    logits = logits_of(4)
    rows = [row(), row(temperature=1.5), row(), row(temperature=0.5, top_p=0.5, repetition_penalty=2.0)]
    tokens = sample(rows, logits)
    assert [tokens[0], tokens[2]] == mx.argmax(logits, axis=-1)[mx.array([0, 2])].tolist()


def test_a_seeded_row_gets_the_same_tokens_in_any_company() -> None:
    logits = mx.stack([logits_of(3, seed) for seed in range(20)])
    mine = {"temperature": 1.2, "top_p": 0.95}
    alone = Sampler([row(5, **mine)], VOCABULARY)
    first = Sampler([row(5, **mine), row(6, temperature=0.3), row()], VOCABULARY)
    last = Sampler([row(), row(7, temperature=2.0, top_k=3), row(5, **mine)], VOCABULARY)
    fed = mx.zeros((1,), dtype=mx.uint32), mx.zeros((3,), dtype=mx.uint32)
    for step in range(20):
        mine_only = logits[step, :1]
        others = logits[step, 1:]
        one = alone(mine_only, fed[0])[0].item()
        assert first(mx.concatenate([mine_only, others]), fed[1])[0][0].item() == one
        assert last(mx.concatenate([others, mine_only]), fed[1])[0][2].item() == one


def test_a_sampler_built_anew_goes_on_where_the_old_one_was() -> None:
    logits = [logits_of(1, seed) for seed in range(6)]
    fed = mx.zeros((1,), dtype=mx.uint32)
    whole = Sampler([row(temperature=1.0)], VOCABULARY)
    expected = [whole(step, fed)[0].item() for step in logits]
    # Two tokens are known to the host, a third is under way: the next is the token at position 3.
    resumed = Sampler([row(temperature=1.0, prompt=[9], generated=expected[:2])], VOCABULARY)
    assert [resumed(step, fed)[0].item() for step in logits[3:]] == expected[3:]


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    generated=st.lists(st.integers(0, 9), max_size=5),
    started=st.booleans(),
    count=st.integers(0, 12),
)
def test_the_tokens_before_the_fed_one(prompt: list[int], generated: list[int], started: bool, count: int) -> None:
    generated = generated if started else []
    known = prompt + generated if started else prompt[:-1]
    assert (
        SamplingRow(Sampling(), 0, prompt, generated, started).before(count)
        == known[len(known) - min(count, len(known)) :]
    )


@given(
    values=st.lists(st.integers(-50, 50), min_size=1, max_size=40, unique=True),
    count=st.integers(1, 40),
    repeat=st.sampled_from([1, 64]),
)
@settings(deadline=None)
def test_most_likely_is_a_descending_sort(values: list[int], count: int, repeat: int) -> None:
    """Also in groups, which is how large vocabularies are searched."""
    values = [value + 1000 * i for i in range(repeat) for value in values]
    count = min(count, len(values))
    found, best = most_likely(mx.array([values], dtype=mx.float32), count)
    assert best[0].tolist() == sorted(values, reverse=True)[:count]
    assert [values[i] for i in found[0].tolist()] == best[0].tolist()


def kept_by(logits: np.ndarray[Any, Any], top_p: float, min_p: float, top_k: int) -> set[int]:
    """Tokens that may be drawn, one row, the plain way."""
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
    kept = set(order[before < top_p].tolist()) if top_p < 1 else set(order.tolist())
    kept &= set(np.flatnonzero(probabilities >= min_p * probabilities.max()).tolist())
    return kept & set(order[: top_k or len(order)].tolist())


def test_rows_with_different_filters_draw_only_what_theirs_keep() -> None:
    rows = [
        {"top_p": 0.3},
        {"min_p": 0.2},
        {"top_k": 3},
        {"top_p": 0.8, "min_p": 0.05, "top_k": 9},
        {},
    ]
    logits = logits_of(len(rows), 3)
    sampler = Sampler([row(i, temperature=3.0, **fields) for i, fields in enumerate(rows)], VOCABULARY)
    fed = mx.zeros((len(rows),), dtype=mx.uint32)
    drawn = np.array([sampler(logits, fed)[0].tolist() for _ in range(400)])
    for i, fields in enumerate(rows):
        values = np.array(logits[i].tolist())
        allowed = kept_by(values, fields.get("top_p", 1.0), fields.get("min_p", 0.0), int(fields.get("top_k", 0)))
        assert set(drawn[:, i].tolist()) <= allowed
        if len(allowed) <= 8:
            assert set(drawn[:, i].tolist()) == allowed, "at this temperature 400 draws find them all"


def test_min_p_keeps_what_upstream_keeps() -> None:
    logits = logits_of(1, 4)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    allowed = {i for i, kept in enumerate(mx.isfinite(apply_min_p(logprobs, 0.1))[0].tolist()) if kept}
    assert kept_by(np.array(logits[0].tolist()), 1.0, 0.1, 0) == allowed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    vocabulary, rounds, width = 8, 60, 100
    logits = logits_of(1, 11, vocabulary)
    batch = mx.broadcast_to(logits, (width, vocabulary))
    sampler = Sampler([row(1000 + i, temperature=temperature) for i in range(width)], vocabulary)
    fed = mx.zeros((width,), dtype=mx.uint32)
    drawn = np.concatenate([sampler(batch, fed)[0].tolist() for _ in range(rounds)])
    expected = np.array(mx.softmax(logits[0] / temperature).tolist(), dtype=np.float64)
    expected *= rounds * width / expected.sum()
    statistic = ((np.bincount(drawn, minlength=vocabulary) - expected) ** 2 / expected).sum()
    assert statistic < 24.3, "chi-square with 7 degrees of freedom, p = 0.001"


def test_keys_of_neighbouring_seeds_have_nothing_in_common() -> None:
    keys = {key_of(seed) for seed in range(-500, 500)}
    assert len({high for high, _ in keys}) == len({low for _, low in keys}) == 1000


def test_logprobs_are_the_penalised_distributions_before_temperature() -> None:
    logits = logits_of(3, 6)
    rows = [
        row(temperature=2.0, top_k=2, logprobs=3, logit_bias={5: 1.5}),
        row(),
        row(logprobs=0),
    ]
    tokens, logprobs = Sampler(rows, VOCABULARY)(logits, mx.zeros((3,), dtype=mx.uint32))
    assert logprobs is not None
    assert logprobs.rows == [0, 2]
    biased = np.array(logits[0].tolist())
    biased[5] += 1.5
    reference = biased - np.log(np.exp(biased).sum())
    assert logprobs.chosen[0, 0].item() == pytest.approx(reference[tokens[0].item()], abs=1e-5)
    assert logprobs.top_tokens is not None
    assert logprobs.top is not None
    best = np.argsort(-reference)[:3]
    assert logprobs.top_tokens[0, 0].tolist() == best.tolist()
    assert logprobs.top[0, 0].tolist() == pytest.approx(reference[best].tolist(), abs=1e-5)


def test_no_row_asks_for_logprobs_and_none_are_computed() -> None:
    assert Sampler([row(), row(temperature=1.0)], VOCABULARY)(logits_of(2), mx.zeros((2,), dtype=mx.uint32))[1] is None


def test_half_precision_logits_sample_as_well() -> None:
    logits = logits_of(2).astype(mx.bfloat16)
    penalised = row(presence_penalty=1.0, prompt=[1], generated=[2])
    rows = [row(temperature=1.0, top_p=0.9, logprobs=1), penalised]
    tokens, logprobs = Sampler(rows, VOCABULARY)(logits, mx.array([1, 2], dtype=mx.uint32))
    assert tokens.dtype == mx.uint32
    assert logprobs is not None
    assert logprobs.chosen.dtype == mx.float32
