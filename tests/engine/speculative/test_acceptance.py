"""Acceptance against its definition, and the distribution of what comes out against the target's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.engine.speculative.acceptance import NO_TOKEN, agreeing, leading, replacement, surviving

NEVER = -float("inf")
SKEWED = [0.5, 0.25, 0.125, 0.0625, 0.0625]
TRIALS = 20_000

PAIRS = {
    "equal": (SKEWED, SKEWED),
    "reversed": (SKEWED, SKEWED[::-1]),
    "near": (SKEWED, [0.4, 0.3, 0.15, 0.1, 0.05]),
    "flat draft": (SKEWED, [0.2] * 5),
    "disjoint": ([0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0.3, 0.5]),
    "draft covers less": ([0.2, 0.2, 0.2, 0.2, 0.2], [0, 0, 1, 0, 0]),
    "target covers less": ([0, 0.9, 0.1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]),
    "certain": ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0]),
}
"""What the target wants, and what the draft proposes from."""

CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
"""The 0.999 quantiles by degrees of freedom."""


def logs(probabilities: list[float]) -> mx.array:
    return mx.log(mx.array(probabilities))


def statistic(drawn: np.ndarray, probabilities: list[float]) -> tuple[float, int]:
    """Chi-square of draws, and its degrees of freedom. Nothing that has no probability may occur."""
    found = np.bincount(drawn, minlength=len(probabilities))
    expected = np.array(probabilities) * len(drawn)
    assert not found[expected == 0].any()
    used = expected > 0
    return float(((found[used] - expected[used]) ** 2 / expected[used]).sum()), int(used.sum()) - 1


def rounds(target: list[float], draft: list[float], proposals: int, seed: int) -> tuple[mx.array, mx.array]:
    """TRIALS rounds of rejection sampling: [TRIALS, K + 1] tokens, and how many proposals each kept."""
    noise, accept, rest = mx.random.split(mx.random.key(seed), 3)
    q = mx.broadcast_to(logs(draft), (TRIALS, proposals, len(draft)))
    p = mx.broadcast_to(logs(target), (TRIALS, proposals + 1, len(target)))
    proposed = mx.argmax(q + mx.random.gumbel(q.shape, key=noise), axis=-1)
    kept = surviving(proposed, q, p, mx.random.uniform(shape=proposed.shape, key=accept))
    last = replacement(q, p, kept, mx.random.gumbel((TRIALS, len(target)), key=rest))
    at = mx.arange(proposals + 1)[None]
    tokens = mx.concatenate([proposed, mx.zeros_like(proposed[:, :1])], axis=1)
    return mx.where(at == kept[:, None], last[:, None], tokens), kept


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("proposals", [1, 3])
def test_the_tokens_follow_the_targets_distribution(pair: str, proposals: int) -> None:
    target, draft = PAIRS[pair]
    tokens, kept = (np.array(a.tolist()) for a in rounds(target, draft, proposals, seed=7))
    for position in range(proposals + 1):
        drawn = tokens[kept >= position, position]
        if len(drawn) < 1000:
            continue  # rounds seldom get that far
        value, freedom = statistic(drawn, target)
        assert freedom == 0 or value < CHI_SQUARE[freedom], f"position {position}"


@pytest.mark.parametrize("pair", PAIRS)
def test_as_many_are_kept_as_can_be(pair: str) -> None:
    """One proposal is kept with probability sum(min(p, q)), which no other exact method exceeds."""
    target, draft = PAIRS[pair]
    _, kept = rounds(target, draft, 1, seed=3)
    expected = np.minimum(target, draft).sum()
    deviation = np.sqrt(expected * (1 - expected) / TRIALS)
    assert abs(np.mean(kept.tolist()) - expected) <= 4 * deviation


def test_tokens_after_one_another_are_independent() -> None:
    """Two positions with one distribution each: the pairs follow the product."""
    target, draft = PAIRS["near"]
    tokens, kept = (np.array(a.tolist()) for a in rounds(target, draft, 1, seed=11))
    first = tokens[kept == 1]
    joint = np.bincount(first[:, 0] * 5 + first[:, 1], minlength=25)
    # A first token that was kept follows min(p, q), and says nothing about the second.
    both = np.outer(np.minimum(target, draft) / np.minimum(target, draft).sum(), target).ravel() * len(first)
    assert ((joint - both) ** 2 / both).sum() < 51.2, "chi-square with 24 degrees of freedom, p = 0.001"


def test_leading_stops_at_the_first_that_is_not() -> None:
    kept = mx.array([[True, True, True], [True, False, True], [False, True, True], [True, True, False]])
    assert leading(kept).tolist() == [3, 1, 0, 2]


def test_agreeing_compares_with_the_targets_own_choice() -> None:
    proposed = mx.array([[4, 5, NO_TOKEN], [4, 5, NO_TOKEN], [9, 5, NO_TOKEN]], dtype=mx.uint32)
    chosen = mx.array([[4, 5, 6], [4, 9, 5], [4, 5, 6]], dtype=mx.uint32)
    kept = agreeing(proposed, chosen)
    assert kept.tolist() == [2, 1, 0]
    assert kept.dtype == mx.int32, "it is added to other numbers"


def test_what_the_target_never_says_is_refused_by_any_chance() -> None:
    p = mx.array([[[NEVER, 0.0], [0.0, 0.0]]])
    q = mx.array([[[0.0, 0.0]]])
    assert surviving(mx.array([[0]]), q, p, mx.array([[0.0]])).tolist() == [0]
    assert replacement(q, p, mx.array([0]), mx.array([[50.0, -50.0]])).tolist() == [1]


def test_equal_distributions_always_agree() -> None:
    """Also where rounding makes p a little smaller than q."""
    weights = mx.random.normal((400, 1, 1000), key=mx.random.key(1)) * 4
    proposed = mx.argmax(weights + mx.random.gumbel(weights.shape, key=mx.random.key(2)), axis=-1)
    both = mx.concatenate([weights, weights], axis=1)
    almost_one = mx.full((400, 1), 0.999)
    assert surviving(proposed, weights, both, almost_one).tolist() == [1] * 400


def test_nothing_left_over_falls_back_to_the_target() -> None:
    p = mx.broadcast_to(logs(SKEWED), (1, 2, 5))
    token = replacement(p[:, :1], p, mx.array([0]), mx.array([[0.0, 9.0, 0.0, 0.0, 0.0]]))
    assert token.tolist() == [1]
