"""Attention by blocks of queries is MLX's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine import exponentials
from runner.engine.kv import blocks
from runner.engine.kv.attention import attend
from runner.engine.kv.layout import Layout
from runner.engine.kv.masks import Mask
from runner.engine.loader import load
from tests.engine.conftest import ModelFolder
from tests.engine.operations import operations

pytestmark = pytest.mark.skipif(not exponentials._SLOW, reason="MLX's own is fast enough there")

HEADS = [(4, 4), (4, 2), (6, 1)]


def drawn(rows: int, heads: tuple[int, int], tokens: int, reach: int) -> list[mx.array]:
    shapes = [(rows, heads[0], tokens, 16), (rows, heads[1], reach, 16), (rows, heads[1], reach, 24)]
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def same(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> bool:
    found = blocks.attend(queries, keys, values, 0.3, mask)
    assert found is not None
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mask)
    return bool(mx.allclose(found, expected, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("before", [0, 1, 70, 200])
@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 150])
@pytest.mark.parametrize("heads", HEADS)
def test_in_the_order_of_positions(heads: tuple[int, int], tokens: int, before: int) -> None:
    assert same(*drawn(2, heads, tokens, before + tokens), "causal")


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_other_masks(heads: tuple[int, int], tokens: int) -> None:
    arrays = drawn(3, heads, tokens, 170)
    assert same(*arrays, None)
    for shape in [(3, 1, tokens, 170), (1, 1, tokens, 170), (3, heads[0], tokens, 170)]:
        seen = mx.random.uniform(shape=shape) < 0.5
        seen[..., :1, :] = False  # whoever sees nothing gets the same of all, as from MLX
        assert same(*arrays, seen)
        assert same(*arrays, mx.random.normal(shape))


def test_what_is_left_to_mlx() -> None:
    arrays = drawn(1, (4, 2), 100, 100)
    assert blocks.attend(*arrays, 0.3, "causal") is not None
    assert blocks.attend(*arrays, 0.3, mx.ones((100, 100), dtype=mx.bool_)) is None
    assert blocks.attend(*arrays, 0.3, mx.ones((1, 1, 1, 100), dtype=mx.bool_)) is None
    assert blocks.attend(*arrays, 0.3, mx.ones((1, 1, 100, 100), dtype=mx.float16)) is None
    assert blocks.attend(*(array.astype(mx.bfloat16) for array in arrays), 0.3, "causal") is None
    assert blocks.attend(*drawn(1, (4, 2), 17, 20), 0.3, "causal") is None, "too little"
    sinks = mx.ones((4,))
    expected = mx.fast.scaled_dot_product_attention(*arrays, scale=0.3, mask="causal", sinks=sinks)
    assert mx.allclose(attend(*arrays, None, 0.3, "causal", sinks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, [100, 70]])
def test_a_prompt_s_masks_are_made_once_a_call(
    model_folder: ModelFolder, tmp_path: Path, lengths: list[int] | None
) -> None:
    model = load(model_folder("llama")).model
    caches = Layout(model).new(2)
    caches.call(model, mx.ones((2, 9), dtype=mx.int32), [9, 4])
    mx.eval(caches.layers[0].keys, *(array for layer in caches.layers for array in layer.arrays))
    graph = operations(tmp_path, caches.call(model, mx.ones((2, 100), dtype=mx.int32), lengths))
    assert len(model.layers) > 1
    assert not graph["Softmax"]
    assert (graph["Select"], graph["AddMM"]) == (1, 2 * len(model.layers))
