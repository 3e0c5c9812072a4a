"""Layers whose weights lie in blocks compute what they did, and have each weight in memory once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.engine import blocked, direct, environment, weight_blocks
from runner.engine.blocked import BlockedLinear, BlockedPart
from runner.engine.joined import PartialLinear, join_siblings
from runner.engine.loader import load
from tests.engine.drive import active_memory
from tests.engine.operations import with_views
from tests.engine.tiny import build_model
from tests.engine.weights_that_lie_otherwise import Clock, answer, magnitudes, said_alone_and_together

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="for the CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose heads and MLP are whole blocks."""
    config = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
    return build_model(tmp_path_factory.mktemp("blocks"), config=config | {"num_key_value_heads": 2})


def decide(monkeypatch: pytest.MonkeyPatch, *, pay: bool) -> None:
    """Whether blocks are found faster, for weights of any size."""
    monkeypatch.setattr(weight_blocks, "pay", lambda: pay)
    monkeypatch.setattr(weight_blocks, "_LEAST", 1)


@pytest.mark.parametrize(
    "shape", [(1, 1, 96), (1, 5, 96), (3, 2, 96), (16, 1, 96), (7, 96), (1, 70, 96), (2, 0, 96), (2, 3, 1, 96)]
)
def test_a_layer_computes_what_it_did(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    linear, biased = nn.Linear(96, 192, bias=False), nn.Linear(96, 64)
    x = mx.random.normal(shape)
    exact = [np.array(x, np.float64) @ np.array(layer.weight, np.float64).T for layer in (linear, biased)]
    exact[1] += np.array(biased.bias, np.float64)
    weights = [mx.array(layer.weight) for layer in (linear, biased)]
    decide(monkeypatch, pay=True)
    blocked.install(nn.Sequential(linear, biased))
    for layer, weight, right in zip((linear, biased), weights, exact, strict=True):
        assert type(layer) is BlockedLinear
        assert mx.array_equal(layer.weight, weight).item()
        np.testing.assert_allclose(np.array(layer(x)), right, rtol=1e-5, atol=1e-5)
        assert layer(x).shape == right.shape


@pytest.mark.parametrize(("tokens", "names"), [(1, {"Broadcast": 1, "Matmul": 1, "Reshape": 1}), (5, {"Transpose": 1})])
def test_a_product_is_one_operation_and_views(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: int, names: dict[str, int]
) -> None:
    decide(monkeypatch, pay=True)
    layer = nn.Linear(96, 192, bias=False)
    blocked.install(nn.Sequential(layer))
    x = mx.ones((1, tokens, 96))
    mx.eval(x, layer.blocks)
    found = with_views(tmp_path, layer(x))
    assert found == {"Broadcast": 1, "Matmul": 1, "Reshape": 1} | names


@pytest.mark.parametrize(
    ("layer", "right"),
    [
        (nn.Linear(256, 256), True),
        (nn.Linear(256, 192), False),  # so small that an operation more takes longer
        (nn.Linear(1024, 1920), True),
        (nn.Linear(1024, 2048), False),  # prompts would lose more
        (nn.Linear(1088, 640), False),  # a product with few tokens is not small
        (nn.Linear(512, 640 + 32), False),  # no whole blocks
        (nn.Embedding(512, 256), False),
        (nn.QuantizedLinear(256, 256), False),
    ],
    ids=str,
)
def test_what_lies_in_blocks(monkeypatch: pytest.MonkeyPatch, layer: nn.Module, right: bool) -> None:
    monkeypatch.setattr(weight_blocks, "pay", lambda: True)
    kind = type(layer)
    blocked.install(nn.Sequential(layer))
    assert type(layer) is (BlockedLinear if right else kind)


def test_nothing_does_of_other_types_or_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = nn.Linear(256, 256), nn.Linear(256, 256)
    half.set_dtype(mx.bfloat16)
    for pay, layer in ((True, half), (False, whole)):
        monkeypatch.setattr(weight_blocks, "pay", lambda pay=pay: pay)
        model = nn.Sequential(layer)
        blocked.install(model)
        direct.install(model)
        assert type(layer) is nn.Linear


def test_siblings_are_joined_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each is whole blocks; one that is not keeps them all as they were."""
    decide(monkeypatch, pay=True)
    for outputs, right in ((64, True), (96, False)):
        model = Attention(outputs)
        x = mx.random.normal((2, 3, 128))
        expected = model(x)
        mx.eval(expected)
        assert join_siblings(model, lambda model=model, x=x: model(x)) == 2
        weights = [mx.array(part.weight) for part in (model.q_proj, model.k_proj, model.v_proj)]
        blocked.install(model)
        parts = (model.q_proj, model.k_proj, model.v_proj)
        assert {type(part) for part in parts} == {BlockedPart if right else PartialLinear}
        assert mx.allclose(model(x), expected, rtol=1e-5, atol=1e-5).item()
        assert all(mx.array_equal(part.weight, weight).item() for part, weight in zip(parts, weights, strict=True))


class Attention(nn.Module):
    """Projections of queries, keys and values."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(128, 128, bias=False)
        self.k_proj, self.v_proj = nn.Linear(128, outputs, bias=False), nn.Linear(128, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)


def test_a_model_in_blocks_is_the_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    decide(monkeypatch, pay=False)
    usual = load(folder)
    decide(monkeypatch, pay=True)
    before = active_memory()
    loaded = load(folder)
    assert active_memory() - before < 1.1 * loaded.weights_bytes, "in memory once"
    assert loaded.weights_bytes == usual.weights_bytes
    attention, mlp = loaded.model.layers[0].self_attn, loaded.model.layers[0].mlp
    assert {type(layer) for layer in (attention.q_proj, mlp.up_proj)} == {BlockedPart}
    assert {type(layer) for layer in (attention.o_proj, mlp.down_proj)} == {BlockedLinear}
    sizes = [sum(array.nbytes for _, array in tree_flatten(of.model.parameters())) for of in (loaded, usual)]
    assert sizes[0] == sizes[1]
    for rows, tokens in ((1, 1), (1, 9), (4, 1), (3, 7), (2, 40)):
        text = mx.random.randint(0, loaded.vocabulary, (rows, tokens))
        assert mx.allclose(answer(loaded, text), answer(usual, text), rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_change_layers_in_blocks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, dora: bool
) -> None:
    """Rows with adapters and without, in one batch, say what they say alone, and what they say without blocks."""
    said = []
    for pay in (False, True):
        decide(monkeypatch, pay=pay)
        sizes = magnitudes(load(folder)) if dora else None
        said.append(said_alone_and_together(folder, tmp_path / f"adapter {pay}", sizes))
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


@pytest.mark.parametrize(
    ("seconds", "right"),
    [
        ((5.0, 4.0, 1.3, 1.0, 2.0, 3.0), True),  # the best of both count
        ((5.0, 1.0, 1.1, 1.0, 2.0, 1.0), False),
        ((0.5, 1.0, 0.6, 1.0, 0.7, 1.0), False),
    ],
)
def test_blocks_have_to_be_faster(seconds: tuple[float, ...], right: bool) -> None:
    assert weight_blocks.faster(Clock(iter(seconds))) == right


@pytest.mark.parametrize(
    ("where", "right"),
    [
        (("linux", "x86_64", ""), True),
        (("linux", "x86_64", "0"), False),
        (("linux", "aarch64", ""), False),
        (("darwin", "x86_64", ""), False),
    ],
)
def test_where_it_is_tried(monkeypatch: pytest.MonkeyPatch, where: tuple[str, str, str], right: bool) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(weight_blocks, "faster", lambda: asked.append(where) or True)
    monkeypatch.setattr(environment.sys, "platform", where[0])
    monkeypatch.setattr(environment.platform, "machine", lambda: where[1])
    monkeypatch.setenv(weight_blocks.SWITCH, where[2])
    weight_blocks.pay.cache_clear()
    assert weight_blocks.pay() == weight_blocks.pay() == right
    assert len(asked) == right, "once"
    weight_blocks.pay.cache_clear()
