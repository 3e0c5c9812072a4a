"""A round's verdict: which tokens each row says, from what was proposed and what the target makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import mlx.core as mx
import msgspec

from runner.engine.draw import Draw
from runner.engine.sampling import Choice
from runner.engine.speculative.acceptance import NO_TOKEN, agreeing, replacement, surviving

_ACCEPTING: Final = 0x2545F491
_REPLACING: Final = 0x9E6C63D0
"""Streams of noise of their own; see Draw."""


class Proposal(msgspec.Struct, frozen=True):
    """The token before, K proposals, and none: `sequence` [B, K + 2].

    `weights` [B, K, V] are the logarithms, up to a constant, of what they were drawn from; None where no row rejects.
    """

    sequence: mx.array
    weights: mx.array | None

    @property
    def fed(self) -> mx.array:
        """[B, K + 1]: what is verified in one call."""
        return self.sequence[:, :-1]

    @property
    def tokens(self) -> mx.array:
        """[B, K]."""
        return self.sequence[:, 1:-1]


def sequence(before: mx.array, proposed: Sequence[mx.array]) -> mx.array:
    """[B, K + 2] of the token `before` [B, 1] and K `proposed` ones, [B, 1] each."""
    none = mx.broadcast_to(_no_token(), before.shape)
    return mx.concatenate([before, *proposed, none], axis=1)


@cache
def _no_token() -> mx.array:
    # Kept: a device waits tens of microseconds for a number that the host has just written.
    return mx.array(NO_TOKEN, dtype=mx.uint32)


def verify(proposal: Proposal, choice: Choice, draw: Draw | None) -> tuple[mx.array, mx.array]:
    """Tokens [B, K + 1], and how many proposals were kept [B]: row i says its first `kept[i]` + 1.

    `choice` is the sampler's for the K + 1 positions.
    """
    kept = agreeing(proposal.sequence[:, 1:], choice.tokens)
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
