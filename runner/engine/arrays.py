"""Arrays between host and device, with types that MLX's stubs leave open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")


def start(*trees: Any) -> None:
    """Start computing arrays (and lists, tuples and dicts of them) without waiting for them."""
    mx.async_eval(*trees)  # type: ignore[no-untyped-call]


def to_list(array: mx.array) -> list[Any]:
    """An array with at least one axis as nested lists; waits until it is computed."""
    values: Any = array.tolist()
    assert isinstance(values, list)
    return values


def from_bytes(memory: memoryview) -> mx.array:
    """A copy of bytes in the host's memory, [N] of uint8."""
    return mx.array(memory.cast("B"))  # type: ignore[arg-type]  # any buffer will do


def read_safetensors(path: str) -> dict[str, mx.array]:
    """A safetensors file's tensors, not read yet. Raises what MLX raises: RuntimeError, ValueError."""
    tensors: Any = mx.load(path, format="safetensors")
    return dict(tensors)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays (and lists and tuples of them) whose graph is built by its first call for each shape."""
    made: Callable[..., Any] = mx.compile(function)
    return made


def each(number: int, like: mx.array) -> mx.array:
    """[N], as long as another array and of its type: a number for each.

    In a graph that is kept, a number by itself would be part of a kernel of just that number, and broadcast to an array
    as well: compiling one takes a GPU's compiler seconds. For two arrays of one shape MLX has a kernel.
    """
    return mx.array([number] * like.shape[0], dtype=like.dtype)


def given(owner: Any, names: Sequence[str]) -> list[mx.array]:
    """Of these attributes, each an array or None, those that are arrays."""
    return [array for name in names if (array := getattr(owner, name)) is not None]


def replaced(owner: T, names: Sequence[str], arrays: Iterator[mx.array]) -> T:
    """A copy that has the next of `arrays` in the place of each of those."""
    other = copy(owner)
    for name in names:
        if getattr(owner, name) is not None:
            setattr(other, name, next(arrays))
    return other
