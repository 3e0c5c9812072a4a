"""Filters of all rows at once against one row at a time, and against upstream."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from runner.engine.filters import Filters
from runner.protocol import Sampling

VOCABULARY = 64


def logits_of(rows: int, seed: int = 0) -> mx.array:
    return mx.random.normal((rows, VOCABULARY), key=mx.random.key(seed)) * 2


def kept(logits: mx.array, *fields: dict[str, Any]) -> list[set[int]]:
    """The tokens that each row's filters leave."""
    filters = Filters([Sampling(temperature=1.0, **one) for one in fields], logits.shape[-1])
    left = filters(logits[:, None]).apply(logits[:, None])[:, 0]
    return [{token for token, value in enumerate(row) if value != -float("inf")} for row in left.tolist()]


def finite(logits: mx.array) -> list[set[int]]:
    return [{token for token, is_kept in enumerate(row) if is_kept} for row in mx.isfinite(logits).tolist()]


def logprobs_of(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_upstream_keeps(top_p: float) -> None:
    logits = logits_of(5)
    assert kept(logits, *[{"top_p": top_p}] * 5) == finite(apply_top_p(logprobs_of(logits), top_p))


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_upstream_keeps(min_p: float) -> None:
    logits = logits_of(5)
    assert kept(logits, *[{"min_p": min_p}] * 5) == finite(apply_min_p(logprobs_of(logits), min_p))


@pytest.mark.parametrize("top_k", [1, 7, VOCABULARY - 1])
def test_top_k_keeps_what_upstream_keeps(top_k: int) -> None:
    logits = logits_of(5)
    assert kept(logits, *[{"top_k": top_k}] * 5) == finite(apply_top_k(logits, top_k))


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    """The first of them, so that the choice does not depend on how others are sorted."""
    logits = mx.concatenate([mx.zeros((2, VOCABULARY)), logits_of(1)])
    logits[1, 40] = 1.0
    found = kept(logits, {"top_k": 5}, {"top_k": 3}, {"top_k": VOCABULARY + 5})
    assert found == [{0, 1, 2, 3, 4}, {0, 1, 40}, set(range(VOCABULARY))]


def test_the_most_likely_always_stays() -> None:
    assert kept(logits_of(1), {"top_p": 0.0}) == [{int(mx.argmax(logits_of(1)[0]).item())}]


def test_half_precision_has_the_same_order() -> None:
    logits = logits_of(3).astype(mx.bfloat16)
    ways = ({"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9})
    assert kept(logits, *ways) == kept(logits.astype(mx.float32), *ways)


def kept_by(logits: np.ndarray[Any, Any], top_p: float, min_p: float, top_k: int) -> set[int]:
    """Tokens that may be drawn, one row, the plain way."""
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
    left = set(order[before < top_p].tolist()) if top_p < 1 else set(order.tolist())
    left &= set(np.flatnonzero(probabilities >= min_p * probabilities.max()).tolist())
    return left & set(order[: top_k or len(order)].tolist())


ways = st.fixed_dictionaries(
    {},
    optional={
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2]),
        "top_k": st.sampled_from([0, 1, 5, 30, 500]),
    },
)


@given(rows=st.lists(ways, min_size=1, max_size=5), seed=st.integers(0, 50), forbidden=st.integers(0, VOCABULARY - 1))
@settings(deadline=None, max_examples=60)
def test_rows_with_different_filters_keep_what_each_keeps_alone(
    rows: list[dict[str, Any]], seed: int, forbidden: int
) -> None:
    """Also where a grammar has left tokens out already."""
    logits = logits_of(len(rows), seed)
    logits[:, :forbidden] = -float("inf")
    values = np.array(logits.tolist())
    allowed = set(range(forbidden, VOCABULARY))
    expected = [
        kept_by(row, one.get("top_p", 1.0), one.get("min_p", 0.0), one.get("top_k", 0)) & allowed
        for row, one in zip(values, rows, strict=True)
    ]
    assert kept(logits, *rows) == expected
