"""Packed keys and values unpacked a part at a time are attended to as they are all at once, in less memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv import unpacked
from runner.engine.kv.masks import Mask
from runner.engine.kv.quantised import Quantisation

ROWS, HEADS, GROUPS, WIDTH = 3, 8, 4, 64
EIGHT = Quantisation(8, 64)


def masks(tokens: int, places: int) -> list[Mask]:
    """Of every shape that a mask may have."""
    by_row = mx.arange(places) <= mx.array([places // 3, places // 2, places - 1])[:, None, None, None]
    every = mx.broadcast_to(by_row, (ROWS, 1, tokens, places))
    heads = mx.random.normal((ROWS, HEADS, tokens, places))
    return [None, "causal", every, every[:1], heads, heads[0], heads[0, 0]]


@pytest.mark.parametrize("tokens", [2, 20], ids=["few", "many"])
@pytest.mark.parametrize("most", [2, 1.5, 0.5, 0.25], ids=["rows", "a row", "half a row", "a head"])
def test_in_parts(monkeypatch: pytest.MonkeyPatch, tokens: int, most: float) -> None:
    places = 40
    keys, values = (EIGHT.pack(mx.random.normal((ROWS, GROUPS, places, WIDTH), key=mx.random.key(i))) for i in range(2))
    queries = mx.random.normal((ROWS, HEADS, tokens, WIDTH))
    row = 2 * GROUPS * places * WIDTH * 4
    asked: list[tuple[int, ...]] = []

    def unpack(packed: tuple[mx.array, mx.array, mx.array]) -> mx.array:
        asked.append(packed[0].shape)
        return EIGHT.unpack(packed)

    for mask in masks(tokens, places):
        for sinks in (None, mx.arange(HEADS) / HEADS):
            whole = unpacked.attend(queries, keys, values, EIGHT.unpack, 0.125, mask, sinks)
            monkeypatch.setattr(unpacked, "_MOST", int(most * row))
            asked.clear()
            found = unpacked.attend(queries, keys, values, unpack, 0.125, mask, sinks)
            monkeypatch.undo()
            assert mx.allclose(found, whole, atol=1e-5)
            assert max(2 * shape[0] * shape[1] * places * WIDTH * 4 for shape in asked) <= most * row
            assert len(asked) > 2


def test_parts_are_unpacked_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    places, rows = 2048, 8
    packed = EIGHT.pack(mx.random.normal((rows, GROUPS, places, WIDTH)))
    queries = mx.random.normal((rows, HEADS, 1, WIDTH))
    whole = 2 * rows * GROUPS * places * WIDTH * 4
    mx.eval(packed, queries)

    def peak() -> int:
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(unpacked.attend(queries, packed, packed, EIGHT.unpack, 0.125, None, None))
        return mx.get_peak_memory() - before

    assert peak() > whole
    monkeypatch.setattr(unpacked, "_MOST", whole // rows)
    assert peak() < whole / 2
