"""The order in memory of small weights on the CPU: that of their transpose.

A linear layer's weight is [outputs, inputs], and x @ weight.T has BLAS transpose it. OpenBLAS multiplies small matrices
as they lie, copying nothing beforehand (its `gemm_small_kernel`, which processors with AVX-512 have): up to some 1,200
outputs times tokens if one of them is to be transposed, and up to `DIRECT` multiplications if none is. So weights that
are small enough are laid out anew when they are loaded. Whoever reads them finds the same numbers at the same indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

DIRECT: Final = 1_000_000
"""Outputs times inputs times tokens."""

_ROUND: Final = 5
"""Tokens that the target verifies in a call: four proposals, as they are by default, and the one before."""


def arranged(weight: mx.array) -> mx.array:
    """The same weight [outputs, inputs], which lies as its transpose would if that is of use, not computed yet then."""
    return mx.contiguous(weight.T).T if _small(weight, tokens=1) else weight


def parted(weights: Sequence[mx.array]) -> bool:
    """Whether weights [outputs, inputs] of one input are better apart: a round's product with each is small, that with
    all of them is not, and would take twice as long."""
    outputs = sum(weight.shape[0] for weight in weights)
    whole = outputs * weights[0].shape[1] * _ROUND
    return whole > DIRECT and all(_small(weight, tokens=_ROUND) for weight in weights)


def _small(weight: mx.array, tokens: int) -> bool:
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return bool(on_cpu and weight.dtype == mx.float32 and weight.size * tokens <= DIRECT)
