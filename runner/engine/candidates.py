"""Drawing from a large vocabulary on the CPU, without sorting it.

Filters mostly keep a few tokens of many. The most likely ones are among the groups with the largest maxima; whatever is
outside of those groups is at most as likely as the least of their maxima. So when every row's threshold lies above
that, what the filters keep is among a few thousand candidates, exactly. Whether it does has to be read, which costs
nothing on the CPU, where the host waits for the computation anyway; where it does not, all tokens are looked at.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx
import msgspec

from runner.engine.filters import Filters, Kept

_LARGE: Final = 16_384
"""Tokens of a vocabulary from which on this pays."""

_GROUPS: Final = 64
_WIDTHS: Final = (64, 32, 16)


class Candidates(msgspec.Struct, frozen=True):
    """Everything that any row may draw: `logits` [B, T, C], and what the filters `kept` of them.

    `groups` [B, T, G] are those that they come from, in ascending order, each `width` tokens wide.
    """

    logits: mx.array
    kept: Kept
    groups: mx.array
    width: int

    def take(self, values: mx.array) -> mx.array:
        """The candidates' of values [B, T, V]."""
        grouped = values.reshape(*values.shape[:-1], -1, self.width)
        return mx.take_along_axis(grouped, self.groups[..., None], axis=-2).reshape(self.logits.shape)

    def ids(self, chosen: mx.array) -> mx.array:
        """Token ids [B, T] of candidates by index [B, T]."""
        group = mx.take_along_axis(self.groups, (chosen // self.width)[..., None], axis=-1)[..., 0]
        return group * self.width + chosen % self.width


def candidates(logits: mx.array, filters: Filters, greedy: mx.array | None) -> Candidates | None:
    """Of logits [B, T, V]; None where they are not known to be all that is kept, or are not worth it.

    `greedy` [B, 1] rows draw nothing, None when there are none.
    """
    size = logits.shape[-1]
    width = next((width for width in _WIDTHS if size % width == 0), 0)
    if mx.default_device() != mx.Device(mx.cpu) or size < _LARGE or not width or filters.some_unfiltered:
        return None
    maxima = mx.max(logits.reshape(*logits.shape[:-1], size // width, width), axis=-1)
    groups = mx.sort(mx.argpartition(maxima, kth=size // width - _GROUPS, axis=-1)[..., -_GROUPS:], axis=-1)
    outside = mx.min(mx.take_along_axis(maxima, groups, axis=-1), axis=-1, keepdims=True)
    found = Candidates(mx.zeros((*logits.shape[:-1], _GROUPS * width)), Kept(None), groups, width)
    among = found.take(logits)
    normaliser = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True) if filters.top_p is not None else None
    kept = filters(among, normaliser)
    assert kept.least is not None
    certain = kept.least > outside
    if greedy is not None:
        certain = certain | greedy[..., None]
    if not certain.all().item():
        return None
    return Candidates(among, kept, groups, width)
