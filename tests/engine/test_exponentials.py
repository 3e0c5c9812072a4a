"""Exponentials by `powf`: how exact they are, what they do at the ends of float32, and who computes them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations

from runner.engine import exponentials
from runner.engine.exponentials import precise_swiglu, softmax, swiglu, weighted
from runner.engine.kv import quantised
from runner.engine.kv.attention import attend
from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import load
from tests.engine.conftest import ModelFolder
from tests.engine.operations import operations

pytestmark = pytest.mark.skipif(not exponentials._SLOW, reason="MLX's own are fast enough there")

MANY = 1 << 17


@pytest.mark.parametrize(("least", "off"), [(-80.0, 2.2e-6), (-10.0, 3.3e-7)])
def test_a_weight_is_as_exact_as_is_said(least: float, off: float) -> None:
    scores = np.linspace(least, 0, MANY, dtype=np.float32)
    weights, _ = softmax(mx.array(scores))
    exact = np.exp(scores.astype(np.float64))
    assert np.max(np.abs(np.array(weights, dtype=np.float64) / exact - 1)) < off


def test_a_gate_is_as_exact_as_is_said() -> None:
    gate = np.linspace(-30, 30, MANY, dtype=np.float32)
    found = np.array(swiglu(mx.array(gate), mx.ones((MANY,))), dtype=np.float64)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide))
    assert np.max(np.abs(found - exact)[exact != 0] / np.abs(exact[exact != 0])) < 9e-7


@pytest.mark.parametrize("x", [0.0, 1.0, -2.5, 3e38, -3e38])
def test_gates_at_the_ends_are_upstream_s(x: float) -> None:
    """An overflow of e^-gate is a zero, and nothing overflows that does not for upstream."""
    ends = [0.0, -0.0, 88.0, -88.0, 89.0, -89.0, 104.0, -104.0, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
    gate = mx.repeat(mx.array(ends), 64)
    usual = activations.swiglu(gate, mx.full(gate.shape, x))
    found = swiglu(gate, mx.full(gate.shape, x))
    assert mx.allclose(found, usual, rtol=1e-5, atol=1e-35, equal_nan=True)


def test_a_precise_gate_is_of_its_input_s_type() -> None:
    h, gate, x = (mx.random.normal((4, 256)).astype(mx.bfloat16) for _ in range(3))
    found = precise_swiglu(h, gate, x)
    assert found.dtype == mx.bfloat16
    assert mx.allclose(found, activations.precise_swiglu(h, gate, x), rtol=1e-2)


def test_what_is_hidden_weighs_nothing() -> None:
    least = mx.finfo(mx.float32).min
    scores = mx.random.normal((16, 128)) * 30
    scores[3, 5:] = least
    scores[7] = least
    scores[9, ::2] = -float("inf")
    found = weighted(scores, lambda weights: weights @ mx.eye(128))
    assert mx.allclose(found, mx.softmax(scores, axis=-1, precise=True), rtol=1e-5, atol=1e-12)
    assert mx.array_equal(found[7], mx.full((128,), 1 / 128))


def test_little_and_other_types_are_left_to_upstream(tmp_path: Path) -> None:
    def made(rows: int, dtype: mx.Dtype) -> list[bool]:
        gate = mx.ones((rows, 128), dtype=dtype)
        graphs = swiglu(gate, gate), weighted(gate, lambda weights: weights)
        return ["Power" in operations(tmp_path, graph) for graph in graphs]

    assert made(3, mx.float32) == [False, False]
    assert made(11, mx.float32) == [True, False]
    assert made(12, mx.float32) == [True, True]
    assert made(12, mx.bfloat16) == [False, False]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_a_loaded_model_has_gates_computed_here(model_folder: ModelFolder, tmp_path: Path, kind: str) -> None:
    model = load(model_folder(kind)).model
    graph = operations(tmp_path, model(mx.ones((1, 100), dtype=mx.int32)))
    assert graph["Power"] >= 2 * len(model.layers), "gates and weights"
    assert not graph["Sigmoid"]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_attention_to_many_keys_weighs_them_here(tmp_path: Path, tokens: int, packed: bool) -> None:
    """To the same result."""
    quantisation = Quantisation(8, 64)
    queries, keys, values = (mx.random.normal((3, heads, n, 64)) for heads, n in ((4, tokens), (2, 130), (2, 130)))
    arrays = [quantisation.pack(array) for array in (keys, values)]
    if packed:
        keys, values = (quantisation.unpack(array) for array in arrays)
    seen = mx.broadcast_to(mx.arange(130) <= mx.array([40, 80, 129])[:, None, None, None], (3, 1, tokens, 130))
    mx.eval(queries, keys, values, seen, arrays)
    if packed:
        found = quantised.attend(queries, *arrays, quantisation, 0.125, seen, None)
    else:
        found = attend(queries, keys, values, None, 0.125, seen)
    graph = operations(tmp_path, found)
    assert (graph["Power"], graph["Softmax"]) == (1, 0)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask=seen)
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5)
