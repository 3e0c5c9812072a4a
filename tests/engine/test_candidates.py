"""A large vocabulary is not sorted where a few candidates are sure to be enough; what is drawn is the same."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from runner.engine import draw as draw_module
from runner.engine.candidates import candidates
from runner.engine.filters import Filters
from runner.engine.sampling import Sampler, SamplingRow
from runner.protocol import Sampling

VOCABULARY = 32_000
FILTERED: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 40},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.0001},
    {"top_p": 0.0},
]


def peaked(rows: int, seed: int = 0) -> mx.array:
    """As of a trained model: a few tokens have nearly all of the probability."""
    return mx.random.normal((rows, VOCABULARY), key=mx.random.key(seed)) ** 3


def settings_of(rows: list[dict[str, Any]]) -> list[Sampling]:
    return [Sampling(**{"temperature": 0.8, **row}) for row in rows]


def certain(logits: mx.array, rows: list[dict[str, Any]], greedy: mx.array | None = None) -> bool:
    return candidates(logits[:, None], Filters(settings_of(rows), VOCABULARY), greedy) is not None


@pytest.mark.parametrize("way", FILTERED)
def test_is_enough_for_what_a_model_is_sure_of(way: dict[str, Any]) -> None:
    assert certain(peaked(3), [way] * 3)


def test_is_not_enough_where_many_tokens_are_kept() -> None:
    flat = mx.random.normal((2, VOCABULARY)) * 0.1
    assert not certain(flat, [{"top_p": 0.9}] * 2)
    assert not certain(flat, [{"min_p": 0.5}] * 2)
    assert certain(flat, [{"top_k": 5}] * 2)
    assert not certain(flat, [{"top_k": 5_000}] * 2)
    assert not certain(peaked(2), [{"top_p": 0.9}, {}]), "one row draws from all tokens"
    assert not certain(mx.concatenate([peaked(1), flat[:1]]), [{"top_p": 0.9}] * 2), "one row is not certain"
    assert certain(mx.concatenate([peaked(1), flat[:1]]), [{"top_p": 0.9}] * 2, mx.array([[False], [True]]))


def test_equal_logits_at_the_edge_are_looked_at_all() -> None:
    """More of them than candidates have room for."""
    logits = mx.where(mx.arange(VOCABULARY) % 3 == 0, 1.0, -1.0)[None]
    assert not certain(logits, [{"top_k": 5}])


def test_a_vocabulary_without_even_groups() -> None:
    assert candidates(peaked(1)[:, None, :-1], Filters(settings_of(FILTERED[:1]), VOCABULARY - 1), None) is None


@pytest.mark.parametrize("spread", ["peaked", "tied", "masked"])
def test_the_same_is_drawn(monkeypatch: pytest.MonkeyPatch, spread: str) -> None:
    rows = [*FILTERED, {"temperature": 0.0}]
    sampling = [SamplingRow(settings, i, [1], [], False) for i, settings in enumerate(settings_of(rows))]
    fed = mx.zeros((len(rows),), dtype=mx.uint32)
    found: list[Any] = []
    seen: list[bool] = []

    def watched(*arguments: Any) -> Any:
        few = candidates(*arguments)
        seen.append(few is not None)
        return few

    for way in (watched, lambda *_: None):
        monkeypatch.setattr(draw_module, "candidates", way)
        sampler = Sampler(sampling, VOCABULARY)
        tokens = []
        for step in range(20):
            logits = peaked(len(rows), step)
            if spread == "tied":
                logits = mx.round(logits)
            if spread == "masked":
                logits = mx.where(mx.arange(VOCABULARY) % 100 < 3, logits, -float("inf"))
            tokens.append(sampler(logits, fed)[0].tolist())
        found.append(tokens)
    assert found[0] == found[1]
    assert any(seen), "it was tried"
