"""Proposals and verdicts through the real sampler, thousands of rows at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine.sampling import Sampler, SamplingRow
from runner.engine.speculative.verify import Proposal, sequence, verify
from runner.protocol import Sampling
from tests.engine.speculative.test_acceptance import CHI_SQUARE, statistic

ROWS, VOCABULARY = 6000, 5
TARGET = mx.array([[1.0, 0.2, 0.0, -0.5, -1.0], [0.0, 1.5, -1.0, 0.3, 0.3], [0.5, 0.5, 0.5, -2.0, 0.0]])
"""Logits after any token, at three positions."""
DRAFT = mx.array([[0.0, 1.0, 0.0, -0.5, 0.5], [0.3, 1.2, -0.5, 0.0, 0.0]])


def rows_of(seeded: bool, **fields: Any) -> list[SamplingRow]:
    return [SamplingRow(Sampling(seed=9 if seeded else None, **fields), 7 * i, [2], [], False) for i in range(ROWS)]


def round_of(sampler: Sampler) -> tuple[mx.array, mx.array, mx.array]:
    """One round of two proposals: tokens [ROWS, 3], how many were kept, and what was proposed."""
    fed, state = mx.full((ROWS, 1), 2, dtype=mx.uint32), sampler.state
    tokens, weights = [], []
    for position in range(2):
        logits = mx.broadcast_to(DRAFT[position], (ROWS, 1, VOCABULARY))
        choice = sampler.proposing.choose(logits, tokens[-1] if tokens else fed, state)
        state = choice.after()
        tokens.append(choice.tokens)
        assert choice.weights is not None
        weights.append(choice.weights)
    proposal = Proposal(sequence(fed, tokens), mx.concatenate(weights, axis=1))
    logits = mx.broadcast_to(TARGET, (ROWS, 3, VOCABULARY))
    choice = sampler.choose(logits, proposal.fed, sampler.state, verifying=True)
    said, kept = verify(proposal, choice, sampler.draw)
    sampler.state = choice.after(kept)
    return said, kept, proposal.tokens


def wanted(position: int, before: int | None = None, **fields: Any) -> list[float]:
    """Probabilities at a position, the plain way; `before` is the token generated just before."""
    logits = np.array(TARGET[position].tolist())
    for token, bias in fields.get("logit_bias", {}).items():
        logits[token] += bias
    if before is not None:
        logits[before] -= fields.get("presence_penalty", 0.0)
    if top_k := fields.get("top_k"):
        logits[np.argsort(-logits)[top_k:]] = -np.inf
    logits = np.exp(logits / fields["temperature"])
    return (logits / logits.sum()).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seeded", [False, True], ids=["rejection", "coupling"])
@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 3}, {"temperature": 1.0, "logit_bias": {4: 1.0}}],
    ids=["plain", "top_k", "bias"],
)
def test_what_is_said_follows_the_targets_distribution(seeded: bool, fields: dict[str, Any]) -> None:
    said, kept, _ = (np.array(a.tolist()) for a in round_of(Sampler(rows_of(seeded, **fields), VOCABULARY)))
    for position in range(3):
        drawn = said[kept >= position, position]
        assert len(drawn) > 300
        value, freedom = statistic(drawn, wanted(position, **fields))
        assert value < CHI_SQUARE[freedom], f"position {position}"


@pytest.mark.parametrize("seeded", [False, True], ids=["rejection", "coupling"])
def test_penalties_see_the_proposals_before(seeded: bool) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "presence_penalty": 1.5}
    said, kept, _ = (np.array(a.tolist()) for a in round_of(Sampler(rows_of(seeded, **fields), VOCABULARY)))
    for first in (0, 1):
        drawn = said[(kept >= 1) & (said[:, 0] == first), 1]
        assert len(drawn) > 300
        value, freedom = statistic(drawn, wanted(1, first, **fields))
        assert value < CHI_SQUARE[freedom], f"after {first}"


def test_a_seeded_row_says_what_it_says_without_a_draft() -> None:
    rows = rows_of(True, temperature=1.0)
    said, kept, _ = round_of(Sampler(rows, VOCABULARY))
    plain, fed = Sampler(rows, VOCABULARY), mx.full((ROWS,), 2, dtype=mx.uint32)
    for position in range(3):
        fed, _ = plain(mx.broadcast_to(TARGET[position], (ROWS, VOCABULARY)), fed)
        assert not mx.any((said[:, position] != fed) & (kept >= position))


def test_rejection_keeps_more_than_coupling_and_both_keep_what_they_should() -> None:
    shares = {}
    for seeded in (False, True):
        _, kept, _ = round_of(Sampler(rows_of(seeded, temperature=1.0), VOCABULARY))
        shares[seeded] = np.mean(np.array(kept.tolist()) >= 1)
    p, q = (np.array(mx.softmax(logits[0]).tolist()) for logits in (TARGET, DRAFT))
    overlap = np.minimum(p, q).sum()
    assert shares[False] == pytest.approx(overlap, abs=0.02)
    assert overlap / (2 - overlap) < shares[True] < overlap + 0.02, "the bounds of Daliri, Musco and Suresh"


def test_greedy_seeded_and_unseeded_rows_share_a_round() -> None:
    kinds = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=1.0)]
    rows = [SamplingRow(kinds[i % 3], 7 * i, [2], [], False) for i in range(ROWS)]
    sampler = Sampler(rows, VOCABULARY)
    said, kept, proposed = (np.array(a.tolist()) for a in round_of(sampler))
    greedy = slice(0, None, 3)
    # The draft's best first token is not the target's, so greedy rows keep none of it and say the target's.
    assert set(proposed[greedy, 0].tolist()) == {1}
    assert set(said[greedy, 0].tolist()) == {0}
    assert not kept[greedy].any()
    for kind in (1, 2):
        drawn = said[kind::3, 0]
        assert statistic(drawn, wanted(0, temperature=1.0))[0] < CHI_SQUARE[4]
    assert sampler.state.position is not None
    assert np.array_equal(np.array(sampler.state.position[:, 0].tolist()), kept + 1)
