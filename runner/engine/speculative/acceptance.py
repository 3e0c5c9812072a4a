"""Which proposed tokens a row keeps: all rows at once, and nothing of it on the host.

A row whose choice is bound to its noise (greedy rows have none, a seeded row has its own for each position) takes the
token that the target itself chooses at each position, for as long as the proposals are just those: it says what it
would say without a draft, whatever the draft is and however many tokens are proposed at a time. The draft proposes with
the same noise, which makes agreement likely (Gumbel coupling; Daliri, Musco and Suresh, arXiv:2408.07978).

Other rows are accepted by rejection sampling, which agrees more often, and gives the target's distribution for any
proposals (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318): a proposal drawn from q is kept with
probability min(1, p/q), and the first that is not is replaced by a draw from what p has over q.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

NO_TOKEN: Final = 2**32 - 1
"""A number that no token has."""


def agreeing(proposed: mx.array, chosen: mx.array) -> mx.array:
    """[B] int32: the place of the first of `proposed` that is not what the target chose; both are [B, K + 1].

    After K proposals there is one that never is (NO_TOKEN), so that it is also how many agree.
    """
    return mx.argmax(proposed != chosen, axis=1).view(mx.int32)


def leading(kept: mx.array) -> mx.array:
    """[B] int32: how many of [B, K] are true before the first that is not."""
    return mx.cumprod(kept.astype(mx.int32), axis=1).sum(axis=1)


def surviving(proposed: mx.array, draft: mx.array, target: mx.array, uniform: mx.array) -> mx.array:
    """[B] int32: how many of `proposed` [B, K] rejection sampling keeps.

    `draft` [B, K, V] and `target` [B, K + 1, V] are logarithms, up to a constant of each position, of what the
    proposals were drawn from and of what is wanted; `uniform` [B, K] is in [0, 1).
    """
    at = proposed[..., None].astype(mx.int32)
    wanted = _log_probability(target[:, :-1], at)
    # u < p/q; a token that the target never says is refused even by u = 0.
    kept = (mx.log(uniform) < wanted - _log_probability(draft, at)) & (wanted > -float("inf"))
    return leading(kept)


def replacement(draft: mx.array, target: mx.array, kept: mx.array, gumbel: mx.array) -> mx.array:
    """[B]: the token after the first `kept` [B] proposals; arguments as for `surviving`, `gumbel` [B, V] is noise.

    Where a proposal was refused it is drawn from max(p - q, 0), normalised; after the last proposal from p itself.
    """
    proposals = draft.shape[1]
    index = kept[:, None, None]
    p = mx.softmax(mx.take_along_axis(target, index, axis=1)[:, 0], axis=-1, precise=True)
    q = mx.softmax(mx.take_along_axis(draft, mx.minimum(index, proposals - 1), axis=1)[:, 0], axis=-1, precise=True)
    rest = mx.maximum(p - mx.where(kept[:, None] < proposals, q, 0), 0)
    # Rounding may leave nothing of two equal distributions.
    rest = mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
    return mx.argmax(mx.log(rest) + gumbel, axis=-1)


def _log_probability(weights: mx.array, at: mx.array) -> mx.array:
    """[B, K]: of the tokens `at` [B, K, 1], by unnormalised logarithms [B, K, V]."""
    return (mx.take_along_axis(weights, at, axis=-1) - mx.logsumexp(weights, axis=-1, keepdims=True))[..., 0]
