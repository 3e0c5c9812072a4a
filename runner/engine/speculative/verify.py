"""A round's verdict: which tokens each row says, from what was proposed and what the target makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from runner.engine.draw import Draw
from runner.engine.sampling import Choice
from runner.engine.speculative.acceptance import agreeing, replacement, surviving

_ACCEPTING: Final = 0x2545F491
_REPLACING: Final = 0x9E6C63D0
"""Streams of noise of their own; see Draw."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """`tokens` [B, K], and the logarithms, up to a constant, of what they were drawn from.

    `weights` [B, K, V] are None where no row draws.
    """

    tokens: mx.array
    weights: mx.array | None


def verify(proposal: Proposal, choice: Choice, draw: Draw | None) -> tuple[mx.array, mx.array]:
    """Tokens [B, K + 1], and how many proposals were kept [B]: row i says its first `kept[i]` + 1.

    `choice` is the sampler's for the K + 1 positions.
    """
    kept = agreeing(proposal.tokens, choice.tokens)
    position = choice.state.position
    if draw is None or draw.unbound is None or position is None:
        return choice.tokens, kept
    assert proposal.weights is not None
    assert choice.weights is not None
    uniform = draw.uniform(position, proposal.tokens.shape[1], _ACCEPTING)
    survived = surviving(proposal.tokens, proposal.weights, choice.weights, uniform)
    noise = draw.gumbel(position + survived[:, None].astype(position.dtype), 1, _REPLACING)[:, 0]
    last = replacement(proposal.weights, choice.weights, survived, noise)
    said = mx.concatenate([proposal.tokens, proposal.tokens[:, -1:]], axis=1)
    said = mx.where(mx.arange(said.shape[1]) == survived[:, None], last[:, None], said)
    return mx.where(draw.unbound, said, choice.tokens), mx.where(draw.unbound[:, 0], survived, kept)
