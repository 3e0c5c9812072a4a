"""Rotary embeddings that are left to the launch that attends.

A model rotates its queries and keys by their positions, gives the keys to its cache and both to the attention. Where
that is one launch, which knows the positions, the rotation may be part of it, and the two operations a layer go. So a
cache that can do so hands out, in the place of a number, an object that says so (`Deferred`); the model's embedding,
of a class that derives from upstream's, returns its input with a note (`Unrotated`); and what is made of that further
on is ours. A model that does anything else with either trips over them when it is tried at loading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.rope_utils import Llama3RoPE


class Rotation(msgspec.Struct, frozen=True, eq=False):
    """The first `dims` values of a line are rotated, in pairs that are neighbours if `traditional`, else half of `dims`
    apart, by the position times `frequencies` [dims / 2] of float32. `rotate` does so, of lines and tokens before
    them."""

    dims: int
    traditional: bool
    frequencies: mx.array
    rotate: Callable[[mx.array, Any], mx.array]


class Deferred(msgspec.Struct, frozen=True):
    """Tokens before a call, one number or [rows] int32, as a model gets them that need not rotate."""

    offset: int | mx.array


class Unrotated:
    """`lines` [rows, heads, tokens, width] that are to be rotated, `offset` tokens before them."""

    def __init__(self, lines: mx.array, rotation: Rotation, offset: int | mx.array) -> None:
        self.lines = lines
        self.rotation = rotation
        self._offset = offset

    def of(self, lines: mx.array) -> Unrotated:
        """The same of other lines."""
        return Unrotated(lines, self.rotation, self._offset)

    @property
    def rotated(self) -> mx.array:
        """Rotated after all."""
        return self.rotation.rotate(self.lines, self._offset)


def rotated(lines: Any) -> Any:
    """Lines as a model would have them."""
    return lines.rotated if isinstance(lines, Unrotated) else lines


def after(lines: Any, done: mx.array) -> Any:
    """Lines, rotated or not, that are not there before `done` is."""
    if isinstance(lines, Unrotated):
        return lines.of(after(lines.lines, done))
    waiting: mx.array = mx.depends([lines], [done])[0]
    return waiting


def together(queries: Any, keys: Any) -> tuple[mx.array, mx.array, Rotation | None]:
    """Queries and keys, and the rotation that is left to do of both."""
    if isinstance(queries, Unrotated) and isinstance(keys, Unrotated) and queries.rotation is keys.rotation:
        return queries.lines, keys.lines, keys.rotation
    return rotated(queries), rotated(keys), None


def rotation_of(rope: Any) -> Rotation | None:
    """What a model's embedding would leave to others, None for one that leaves nothing."""
    return rope.rotation if isinstance(rope, _Deferring) else None


class _Deferring(nn.Module):  # type: ignore[misc]
    """An embedding that leaves its work to others if it is asked to."""

    rotation: Rotation

    def __call__(self, x: mx.array, offset: Any = 0) -> Any:
        """x is [rows, heads, tokens, width]."""
        if isinstance(offset, Deferred):
            return Unrotated(x, self.rotation, offset.offset)
        return super().__call__(x, offset)


def install(model: Any) -> None:
    """Let the model's embeddings leave their work to others, those of which it is known what they do."""
    made: dict[tuple[Any, ...], mx.array] = {}
    for module in list(model.modules()):
        kind: Any = type(module)
        if kind not in _FREQUENCIES:
            continue
        frequencies = _FREQUENCIES[kind](module)
        key = (kind, module.dims, getattr(module, "base", 0.0), getattr(module, "scale", 1.0))
        frequencies = made.setdefault(key, frequencies) if kind is nn.RoPE else frequencies
        mx.eval(frequencies)
        rotate = _rotating(kind, module)
        object.__setattr__(module, "rotation", Rotation(module.dims, module.traditional, frequencies, rotate))
        module.__class__ = _deferring(kind)


def _of_base(rope: Any) -> mx.array:
    half = rope.dims // 2
    return mx.array([rope.scale * 2.0 ** (-i / half * math.log2(rope.base)) for i in range(half)], dtype=mx.float32)


def _of_wavelengths(rope: Any) -> mx.array:
    wavelengths: mx.array = rope["_freqs"]
    return 1.0 / wavelengths.astype(mx.float32)


_FREQUENCIES: Final[dict[Any, Callable[[Any], mx.array]]] = {nn.RoPE: _of_base, Llama3RoPE: _of_wavelengths}


def _rotating(kind: Any, module: Any) -> Callable[[mx.array, Any], mx.array]:
    return lambda lines, offset: kind.__call__(module, lines, offset)


@cache
def _deferring(kind: Any) -> Any:
    return type(f"Deferring{kind.__name__}", (_Deferring, kind), {"__module__": kind.__module__})
