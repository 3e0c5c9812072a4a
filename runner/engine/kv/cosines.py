"""Rotary embeddings on the CPU: cosines and sines are had once a call, for queries and keys of all layers.

`mx.fast.rope` has no kernel there: it is some 40 operations, most of which make cosines and sines of the positions, and
a small model's step takes as long as its operations are many. Here a model's embeddings, of classes that derive from
upstream's, share them, and rotate in six. Those of the first positions are kept, since each takes 20 ns to compute.
What comes out is the same to the bit: each value goes through the products and the sum that it goes through in MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE, SuScaledRoPE, YarnRoPE

Table = tuple[mx.array, mx.array]
"""Cosines and sines."""

_KEPT: Final = 4096
"""Positions of which they are kept, at most; at first fewer. For heads of 128 values these are 4 MiB."""

_KEPT_FIRST: Final = 64

_BACKWARDS: Final = slice(None, None, -1)
_TURNINGS: Final = "turnings"


class Starts(mx.array):
    """Tokens before a call [rows] int32, of which nobody changes the values: what was made of them, holds.

    Upstream's own caches count in place, so that an array of theirs may be the same one with other values.
    """

    reach: int
    """Tokens that rows have after the call, at most."""


def fixed(starts: mx.array, reach: int) -> mx.array:
    """`starts` for embeddings that share what they make of it: of use on the CPU alone."""
    if not _on_cpu():
        return starts
    made = Starts(starts)
    made.reach = reach
    return made


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


class Form(msgspec.Struct, frozen=True):
    """What a rotation does.

    It multiplies the first `dims` values of a line by `factor`, and turns them in pairs, which are neighbours if
    `traditional`, else half of `dims` apart, by the position times `scale` over a wavelength: those of `base`, or
    `wavelengths`, the bytes of [dims / 2] float32.
    """

    dims: int
    traditional: bool = False
    scale: float = 1.0
    factor: float = 1.0
    base: float = 0.0
    wavelengths: bytes = b""

    @property
    def frequencies(self) -> mx.array:
        """[dims / 2] of float32, rounded as `mx.fast.rope` rounds them."""
        if self.wavelengths:
            return mx.reciprocal(mx.array(list(memoryview(self.wavelengths).cast("f"))))
        half = self.dims // 2
        step = mx.array(math.log(self.base), mx.float32) / half
        return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step)


class Turning:
    """The rotation of a form, with the cosines and sines of the call under way."""

    def __init__(self, form: Form) -> None:
        self._dims, self._scale, self._factor = form.dims, form.scale, form.factor
        half, axis = form.dims // 2, 1 if form.traditional else 0
        # A line is seen as pairs. The other value of a pair is times the sine, which has the sign of its angle.
        self._pairs = (half, 2) if form.traditional else (2, half)
        self._others = (..., _BACKWARDS) if form.traditional else (..., _BACKWARDS, slice(None))
        frequencies = form.frequencies
        self.frequencies = mx.stack([-frequencies, frequencies], axis=axis)
        self._call: tuple[int | Starts, int] | None = None
        self._made: dict[tuple[int, ...], Table] = {}
        self._kept: Table | None = None

    def __call__(self, x: mx.array, offset: int | Starts) -> mx.array:
        """x [rows, heads, tokens, width] of float32, rotated; `offset` tokens are before them."""
        if x.shape[-1] == self._dims:
            return self._rotated(x, offset)
        turned, rest = mx.split(x, [self._dims], axis=-1)
        return mx.concatenate([self._rotated(turned, offset), rest], axis=-1)

    def forget(self) -> None:
        """The call is built."""
        self._call, self._made = None, {}

    def _rotated(self, x: mx.array, offset: int | Starts) -> mx.array:
        shape = x.shape
        if self._factor != 1.0:
            x = x * self._factor
        pairs = x.reshape(*shape[:3], *self._pairs)
        cosines, sines = self._table(offset, pairs.shape)
        return (pairs * cosines + pairs[self._others] * sines).reshape(shape)

    def _table(self, offset: int | Starts, shape: tuple[int, ...]) -> Table:
        """For pairs of this shape: where operands have one shape, an operation need not broadcast them."""
        tokens = shape[2]
        if self._call is None or self._call[1] != tokens or not _same(self._call[0], offset):
            self._call = offset, tokens
            self._made = {(): self._found(offset, tokens)}
        if shape not in self._made:
            cosines, sines = self._made[()]
            self._made[shape] = mx.broadcast_to(cosines, shape), mx.broadcast_to(sines, shape)
        return self._made[shape]

    def _found(self, offset: int | Starts, tokens: int) -> Table:
        """[rows, 1, tokens, …], or [tokens, …] if rows have one offset."""
        reach = offset.reach if isinstance(offset, Starts) else offset + tokens
        if reach > _KEPT:
            return self._computed(_positions(offset, tokens))
        cosines, sines = self._first(reach)
        if isinstance(offset, Starts):
            at = (offset[:, None] + mx.arange(tokens))[:, None]
            return cosines[at], sines[at]
        return cosines[offset:reach], sines[offset:reach]

    def _first(self, reach: int) -> Table:
        """[≥ reach, …]: of all positions from 0 on."""
        if self._kept is None or self._kept[0].shape[0] < reach:
            size = _KEPT_FIRST
            while size < reach:
                size *= 2
            self._kept = self._computed(mx.arange(size, dtype=mx.float32))
            mx.eval(self._kept)
        return self._kept

    def _computed(self, positions: mx.array) -> Table:
        """[…, tokens, …] of positions […, tokens]."""
        if self._scale != 1.0:
            positions = positions * self._scale
        angles = positions[..., None, None] * self.frequencies
        return mx.cos(angles), mx.sin(angles)


def _positions(offset: int | Starts, tokens: int) -> mx.array:
    """[rows, 1, tokens] or [tokens], float32."""
    if isinstance(offset, Starts):
        return (mx.arange(tokens, dtype=mx.float32) + offset[:, None])[:, None]
    return mx.arange(offset, offset + tokens, dtype=mx.float32)


def _same(known: int | Starts, offset: int | Starts) -> bool:
    """Whether these are known to be the same numbers."""
    if isinstance(known, Starts) or isinstance(offset, Starts):
        return known is offset
    return known == offset


class _Sharing(nn.Module):  # type: ignore[misc]
    """An embedding that shares cosines and sines where it can."""

    turning: Turning

    def __call__(self, x: mx.array, offset: Any = 0, *args: Any, **options: Any) -> mx.array:
        """x is [rows, heads, tokens, width]. Whatever is not known to be the same is left to upstream."""
        usual = x.ndim == 4 and x.dtype == mx.float32 and not args and not options
        if usual and (type(offset) is int or (isinstance(offset, Starts) and offset.shape == x.shape[:1])):
            return self.turning(x, offset)
        result: mx.array = super().__call__(x, offset, *args, **options)
        return result


def install(model: Any) -> None:
    """On the CPU, let the model's embeddings share cosines and sines, those of which it is known what they do."""
    if not _on_cpu():
        return
    made: dict[Form, Turning] = {}
    for module in list(model.modules()):
        kind: Any = type(module)
        if kind not in _FORMS:
            continue
        form = _FORMS[kind](module)
        if form not in made:
            made[form] = Turning(form)
        object.__setattr__(module, "turning", made[form])
        module.__class__ = _sharing(kind)
    mx.eval([turning.frequencies for turning in made.values()])
    object.__setattr__(model, _TURNINGS, tuple(made.values()))


def forget(model: Any) -> None:
    """Nothing may hold on to what was made for a call of the model: it has been built."""
    for turning in getattr(model, _TURNINGS, ()):
        turning.forget()


def _usual(rope: Any) -> Form:
    return Form(rope.dims, rope.traditional, scale=rope.scale, base=rope.base)


def _su_scaled(rope: Any) -> Form:
    return Form(rope.dim, factor=vars(rope)["_scale"], wavelengths=_wavelengths(rope))


def _yarn(rope: Any) -> Form:
    return Form(rope.dims, rope.traditional, factor=rope.mscale, wavelengths=_wavelengths(rope))


def _scaled(rope: Any) -> Form:
    return Form(rope.dims, rope.traditional, wavelengths=_wavelengths(rope))


def _wavelengths(rope: Any) -> bytes:
    return bytes(memoryview(rope["_freqs"].astype(mx.float32)))


_FORMS: Final[dict[Any, Callable[[Any], Form]]] = {
    nn.RoPE: _usual,
    Llama3RoPE: _scaled,
    ProportionalRoPE: _scaled,
    SuScaledRoPE: _su_scaled,
    YarnRoPE: _yarn,
}


@cache
def _sharing(kind: Any) -> Any:
    return type(f"Sharing{kind.__name__}", (_Sharing, kind), {"__module__": kind.__module__})
