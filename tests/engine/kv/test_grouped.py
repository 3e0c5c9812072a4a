"""Attention of a few tokens with masks that the product itself adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.kv.attention import attend
from runner.engine.kv.layout import Layout
from runner.engine.loader import load
from tests.engine.conftest import ModelFolder
from tests.engine.operations import operations

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs have kernels for it")


class Alike:
    """A layer's caches for as many rows as asked, with tokens written before."""

    def __init__(self, model: Any, rows: int, lengths: list[int] | None) -> None:
        self.caches = Layout(model).new(rows)
        self.layer = self.caches.layers[0]
        self.caches.call(model, mx.ones((rows, 9), dtype=mx.int32), lengths)


@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize(("rows", "lengths"), [(1, None), (3, None), (3, [9, 2, 5])])
def test_a_mask_that_is_added_hides_what_it_hid(
    model_folder: ModelFolder, rows: int, lengths: list[int] | None, tokens: int
) -> None:
    """Also keys that are there only because other rows are longer."""
    model = load(model_folder("llama")).model
    layer = Alike(model, rows, lengths).layer
    layer._positions.begin(tokens, None)
    attention = model.layers[0].self_attn
    heads, groups = attention.n_heads, attention.n_kv_heads
    assert groups < heads
    width, reach = 8, layer._positions.reach
    queries = 3 * mx.random.normal((rows, heads, tokens, width))
    keys, values = (mx.random.normal((rows, groups, reach, width)) for _ in range(2))
    mask = layer.make_mask(tokens)
    assert isinstance(mask, mx.array)
    before = mx.array(lengths or [9] * rows)[:, None, None]
    seen = mx.arange(reach) <= before + mx.arange(tokens)[:, None]
    assert layer.added(mask, (rows, groups, heads // groups, tokens)) is not None
    found = attend(queries, keys, values, layer, 0.3, mask)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=seen[:, None])
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_is_made_once_a_call(model_folder: ModelFolder, tmp_path: Path) -> None:
    model = load(model_folder("llama")).model
    caches = Alike(model, 1, None).caches
    mx.eval(caches.layers[0].keys, *(array for layer in caches.layers for array in layer.arrays))
    graph = operations(tmp_path, caches.call(model, mx.ones((1, 5), dtype=mx.int32)))
    layers = len(model.layers)
    assert layers > 1
    assert (graph["LessEqual"], graph["Select"], graph["AddMM"]) == (1, 1, layers)


def test_another_mask_is_no_matter_of_the_layer_s(model_folder: ModelFolder) -> None:
    """A model's own, which may be made of other numbers in each layer."""
    model = load(model_folder("llama")).model
    layer = Alike(model, 1, None).layer
    layer._positions.begin(2, None)
    assert layer.added(mx.ones((1, 1, 2, 11), dtype=mx.bool_), (1, 1, 1, 2)) is None
