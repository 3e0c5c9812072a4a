"""Layers whose weights lie as they are multiplied by, and that need no views, are the layers they were."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from runner.engine import direct
from runner.engine.column_major import arranged, parted
from runner.engine.direct import DirectEmbedding, DirectLinear
from runner.engine.joined import PartialLinear, join_siblings, joined_of
from runner.engine.loader import load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import active_memory
from tests.engine.operations import strides, with_views

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="for the CPU")


class Block(nn.Module):
    """An MLP's gate and input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return gate * up


@pytest.mark.parametrize(
    ("shape", "dtype", "turned"),
    [
        ((640, 256), mx.float32, True),
        ((1000, 1000), mx.float32, True),
        ((1001, 1000), mx.float32, False),
        ((640, 256), mx.bfloat16, False),
    ],
)
def test_small_weights_lie_as_their_transpose(shape: tuple[int, int], dtype: mx.Dtype, turned: bool) -> None:
    weight = mx.random.normal(shape).astype(dtype)
    now = arranged(weight)
    assert mx.array_equal(now, weight)
    assert (strides(now)[0] == dtype.size) == turned


@pytest.mark.parametrize(("inner", "saved"), [(300, 1), (640, 0), (1000, 1)])
def test_siblings_stay_apart_where_that_makes_a_round_s_products_small(inner: int, saved: int) -> None:
    """With 256 inputs and five tokens: 300 outputs are small twice, 640 once, and 1,000 never."""
    block = Block(256, inner)
    x = mx.random.normal((1, 5, 256))
    expected = block(x)
    assert join_siblings(block, lambda: block(x)) == saved
    assert mx.allclose(block(x), expected, rtol=1e-4, atol=1e-5)
    assert not parted([mx.zeros((640, 256), dtype=mx.bfloat16)] * 2)


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 64), (3, 2, 64), (5, 64)])
def test_a_layer_computes_what_it_did(shape: tuple[int, ...], tmp_path: Path) -> None:
    linear, biased, embedding = nn.Linear(64, 48, bias=False), nn.Linear(64, 48), nn.Embedding(40, 64)
    x = mx.random.normal(shape)
    expected = [linear(x), biased(x), embedding.as_linear(x), embedding(mx.array([[3, 39]]))]
    mx.eval(expected)
    direct.install(nn.Sequential(linear, biased, embedding))
    assert (type(linear), type(biased), type(embedding)) == (DirectLinear, nn.Linear, DirectEmbedding)
    mx.eval(linear.turned, embedding.turned)
    found = [linear(x), biased(x), embedding.as_linear(x), embedding(mx.array([[3, 39]]))]
    for now, before in zip(found, expected, strict=True):
        assert now.shape == before.shape
        assert mx.allclose(now, before, rtol=1e-5, atol=1e-5)
    if shape[0] == 1:
        mx.eval(x)
        assert with_views(tmp_path, linear(x)) == {"Matmul": 1}
        assert with_views(tmp_path, embedding.as_linear(x)) == {"Matmul": 1}


def test_a_loaded_model_has_each_weight_in_memory_once(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    before = active_memory()
    loaded = load(folder)
    assert active_memory() - before < 1.1 * loaded.weights_bytes
    attention = loaded.model.layers[0].self_attn
    assert type(attention.q_proj) is PartialLinear
    found = joined_of(attention.q_proj)
    assert found is not None
    assert type(found[0].layer) is type(attention.o_proj) is DirectLinear
    for layer in (found[0].layer, attention.q_proj, attention.o_proj):
        assert strides(layer.weight)[0] == layer.weight.itemsize
