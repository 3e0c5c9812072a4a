"""Keys and values in few bits: affine, in groups of a row's width, as `mx.quantize` packs them.

A few new tokens a row are multiplied with the packed arrays as they are: all of a slot's room, so that nothing is
copied to be contiguous, with the places that hold no tokens masked. Many (a chunk of a prompt) are worth unpacking the
keys and values for, once a layer. On CUDA, where MLX compiles its products with packed arrays for a minute each, a few
are as well, if they are not a launch. Either way a query sees packed keys only, its own included, so it does not matter
in which chunks a prompt is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx
import msgspec

from runner.engine import exponentials
from runner.engine.kv import masks, quantised_kernel, unpacked, widened
from runner.engine.kv.layers import JoinedRun, Straight
from runner.engine.kv.masks import FEW
from runner.engine.kv.positions import Positions
from runner.engine.kv.quantised_kernel import JoinedPackedCall, PackedCall
from runner.engine.kv.rotary import Rotation, Unrotated, rotated, together
from runner.engine.kv.unwritten import Unwritten

Packed = tuple[mx.array, mx.array, mx.array]
"""Values, scales and biases."""

_ON_CUDA: Final = bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)


class Quantisation(msgspec.Struct, frozen=True):
    """`bits` a value, and a scale and a bias for each `group_size` of them; for what is at positions from `start` on,
    which sees all before it so (see `threshold.py`)."""

    bits: int
    group_size: int
    start: int = 0

    def pack(self, values: mx.array) -> Packed:
        """[…, width] of any float type."""
        packed, scales, biases = mx.quantize(values, self.group_size, self.bits)
        return packed, scales, biases

    def unpack(self, packed: Packed) -> mx.array:
        """[…, width]"""
        return mx.dequantize(*packed, group_size=self.group_size, bits=self.bits)

    def product(self, x: mx.array, packed: Packed, transpose: bool) -> mx.array:
        """x times the values, or their transpose."""
        if widened.applies(x, packed, self.bits):
            product = widened.scores if transpose else widened.weighted
            return product(x, packed, self.group_size, self.bits)
        return mx.quantized_matmul(x, *packed, transpose=transpose, group_size=self.group_size, bits=self.bits)


class Quantised(Straight):
    """All tokens' keys and values, packed. [slots, heads, capacity, …] three times each."""

    def __init__(
        self,
        positions: Positions,
        quantisation: Quantisation,
        launch: quantised_kernel.PackedLaunch | None = None,
        *,
        rotates: bool = False,
    ) -> None:
        super().__init__(positions, rotates=rotates and launch is not None)
        self.quantisation = quantisation
        self._packed_launch = launch

    @property
    def bits(self) -> int:
        """By its presence, upstream's attention knows what `update_and_fetch` returns."""
        return self.quantisation.bits

    @property
    def group_size(self) -> int:
        """Values that share a scale."""
        return self.quantisation.group_size

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> masks.Mask:
        if not self._multiplies:
            return super().make_mask(count, return_array, window_size)
        made = lambda: masks.roomy(self._positions, window_size)  # noqa: E731
        return self._given(self._positions.once(("roomy", window_size), made), window_size)

    def update_and_fetch(self, keys: Any, values: mx.array) -> Any:
        positions = self._positions
        if self._launches:
            # Only the first call has to say what is to be held.
            like = self._pack(keys.lines if isinstance(keys, Unrotated) else keys, values) if self._planes.empty else ()
            self._planes.reserve(positions.slots, positions.capacity, like)
            self._unwritten = Unwritten(self, keys, values)
            return self._unwritten, self._unwritten
        new = self._pack(rotated(keys), values)
        self._planes.reserve(positions.slots, positions.capacity, new)
        self._planes.write(positions, new)
        return self.keys_and_values()

    def write(self, keys: Any, values: mx.array) -> None:
        self._planes.write(self._positions, self._pack(rotated(keys), values))

    def _pack(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        return *self.quantisation.pack(keys), *self.quantisation.pack(values)

    def attend(self, queries: Any, keys: Any, values: mx.array, scale: float, mask: masks.Mask) -> mx.array | None:
        launch, quantisation = self._packed_launch, self.quantisation
        seen = self._seen(mask)
        if launch is None or seen is None:
            return None
        (window,) = seen
        queries, keys, rotation = together(queries, keys)
        bits, size = quantisation.bits, quantisation.group_size
        same = keys.dtype == values.dtype and self._holds(keys.dtype)
        if not (same and quantised_kernel.applies(queries, keys, values, bits, size)):
            return None
        self._attended = True
        starts = self._starts()

        def run(planes: list[mx.array], after: mx.array | None) -> tuple[mx.array, Sequence[mx.array]]:
            return launch(PackedCall(queries, keys, values, planes, starts, scale, window, bits, size, after, rotation))

        return self._planes.launch(run)

    def _joined(
        self, form: tuple[int, int, int], dtype: mx.Dtype, scale: float, rotation: Rotation
    ) -> JoinedRun | None:
        launch, how = quantised_kernel.joined_launch(self._packed_launch), (self.bits, self.group_size)
        if launch is None or not quantised_kernel.applies_joined(dtype, self._positions.count, *form, *how):
            return None
        return lambda joined, held, starts, after: launch(
            JoinedPackedCall(joined, *form, held, starts, scale, *how, after, rotation)
        )

    def _holds(self, dtype: mx.Dtype) -> bool:
        # A scale is of the type that was packed.
        return [self._planes.types[1], self._planes.types[4]] == [dtype, dtype]

    @property
    def _in_place(self) -> bool:
        return self._packed_launch is not None

    @property
    def _launches(self) -> bool:
        return self._packed_launch is not None and self._positions.count <= FEW

    @property
    def _multiplies(self) -> bool:
        """Whether a call's tokens are multiplied with packed arrays."""
        return self._positions.count <= FEW and not _ON_CUDA

    def keys_and_values(self) -> Any:
        """Keys and values, packed; of all of a slot's room where they are multiplied as they are."""
        positions = self._positions
        tokens = self._planes.capacity if self._multiplies else positions.reach
        planes = self._planes.view(positions.rows, tokens)
        return tuple(planes[:3]), tuple(planes[3:])


def attend(
    queries: mx.array,
    keys: Packed,
    values: Packed,
    quantisation: Quantisation,
    scale: float,
    mask: masks.Mask,
    sinks: mx.array | None,
) -> mx.array:
    """[rows, heads, tokens, width] of queries of that shape; keys and values are packed from [rows, groups, …]."""
    rows, heads, tokens, width = queries.shape
    if _ON_CUDA or tokens > FEW or sinks is not None or not (mask is None or isinstance(mask, mx.array)):
        return unpacked.attend(queries, keys, values, quantisation.unpack, scale, mask, sinks)
    groups = keys[0].shape[1]
    shared = heads // groups
    grouped = (queries * scale).reshape(rows, groups, shared * tokens, width)
    scores = quantisation.product(grouped, keys, transpose=True)
    if mask is not None:
        scores = masks.masked(scores, mask, (rows, groups, shared, tokens))
    attended = exponentials.weighted(scores, lambda weights: quantisation.product(weights, values, transpose=False))
    return attended.reshape(rows, heads, tokens, -1)
