"""Large weights are multiplied a tile at a time, by what the layers were, where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from runner.engine import direct, tiled
from runner.engine.column_major import DIRECT
from runner.engine.joined import joined_of
from runner.engine.loader import load
from runner.engine.tiled import TiledDirectLinear, TiledEmbedding, TiledLinear, Tiles, lines, most_tokens
from tests.engine.drive import active_memory
from tests.engine.operations import strides, with_views
from tests.engine.tiny import build_model
from tests.engine.weights_that_lie_otherwise import Clock, answer, said_alone_and_together

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="for the CPU")

Ask = Callable[[list[mx.array]], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose MLP is large."""
    return build_model(tmp_path_factory.mktemp("large"), config={"hidden_size": 512, "intermediate_size": 2048})


def fixed(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Have tiles be found faster up to so many tokens."""
    monkeypatch.setattr(tiled, "most_tokens", lambda _: most)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16, 32, 33])
@pytest.mark.parametrize("shape", [(8192, 2048), (2048, 8192), (128256, 64), (1000, 2000), (1001, 2000), (24, 1 << 20)])
def test_a_tile_is_small_and_a_part_of_the_outputs(shape: tuple[int, int], tokens: int) -> None:
    count = lines(*shape, tokens)
    if not count:
        assert shape[0] % 8 or 8 * tokens > 256 or 8 * tokens * shape[1] > DIRECT
        return
    assert shape[0] % count == 0
    assert count * tokens <= 256
    assert count * tokens * shape[1] <= DIRECT
    assert count == 128 or shape[0] % (2 * count) or 2 * count * tokens > min(256, DIRECT // shape[1])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1024), (1, 5, 1024), (3, 2, 1024), (16, 1, 1024), (7, 1024), (32, 1, 1024), (33, 1, 1024)]
)
def test_a_layer_computes_what_it_did(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], tmp_path: Path) -> None:
    linear, biased, embedding = nn.Linear(1024, 1536, bias=False), nn.Linear(1024, 1536), nn.Embedding(1088, 1024)
    small, odd = nn.Linear(1024, 64, bias=False), nn.Linear(1024, 1537, bias=False)
    layers = [linear, biased, small, odd]
    x = mx.random.normal(shape)
    calls: list[Callable[[], mx.array]] = [lambda layer=layer: layer(x) for layer in layers]
    calls += [lambda: embedding.as_linear(x), lambda: embedding(mx.array([[3, 1087]]))]
    expected = [call() for call in calls]
    model = nn.Sequential(*layers, embedding)
    mx.eval(expected, model.parameters())
    fixed(monkeypatch, 32)
    direct.install(model)
    mx.eval(model.parameters())
    tiled.install(model)
    kinds = [TiledDirectLinear, TiledLinear, direct.DirectLinear, direct.DirectLinear, TiledEmbedding]
    assert [type(layer) for layer in (*layers, embedding)] == kinds
    for call, before in zip(calls, expected, strict=True):
        assert call().shape == before.shape
        assert mx.allclose(call(), before, rtol=1e-4, atol=1e-4)
    tokens = x.size // 1024
    assert (linear.tiles.product(x) is None) == (tokens > 32)
    if tokens == 1:
        mx.eval(x)
        names = with_views(tmp_path, linear(x))
        assert names.pop("Matmul") == 1
        assert names.keys() <= {"Reshape", "Broadcast", "Transpose", "ExpandDims"}, "the weight is not copied"


def test_a_model_with_tiles_is_the_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    fixed(monkeypatch, 0)
    usual = load(folder)
    fixed(monkeypatch, 32)
    before = active_memory()
    loaded = load(folder)
    assert active_memory() - before < 1.1 * loaded.weights_bytes, "tiles are views"
    assert [name for name, _ in tree_flatten(loaded.model.parameters())] == [
        name for name, _ in tree_flatten(usual.model.parameters())
    ]
    mlp = loaded.model.layers[0].mlp
    group = joined_of(mlp.gate_proj)
    assert group is not None
    assert type(group[0].layer) is type(mlp.down_proj) is TiledDirectLinear
    for rows, tokens in ((1, 1), (1, 9), (4, 1), (3, 7), (2, 40)):
        text = mx.random.randint(0, loaded.vocabulary, (rows, tokens))
        assert mx.allclose(answer(loaded, text), answer(usual, text), rtol=1e-4, atol=1e-4)


def test_adapters_change_layers_with_tiles(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Rows with adapters and without, in one batch, say what they say alone, and what they say without tiles."""
    said = []
    for most in (0, 32):
        fixed(monkeypatch, most)
        said.append(said_alone_and_together(folder, tmp_path / f"adapter {most}"))
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def trials(*ratios: float) -> Iterator[float]:
    """Each number of tokens is tried four times; only the best one counts."""
    for ratio in ratios:
        for slower in (5.0, 3.0, 1.0, 9.0):
            yield ratio * slower
            yield 1.0 * slower


@pytest.mark.parametrize(
    ("ratios", "most"),
    [((3.0, 3.0, 2.5, 2.0, 1.8, 1.5), 32), ((3.0, 2.0, 1.19), 2), ((1.0,), 0), ((3.0, 1.25, 1.1, 9.0), 2)],
)
def test_tiles_are_for_as_many_tokens_as_they_are_faster_with(ratios: tuple[float, ...], most: int) -> None:
    assert most_tokens([mx.zeros((2048, 1536))] * 2, Clock(trials(*ratios))) == most


def test_more_tokens_than_a_tile_can_have_are_not_tried() -> None:
    assert most_tokens([mx.zeros((128, 16384))], Clock(trials(*[3.0] * 6))) == 4


def test_weights_of_each_shape_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tiles are for those that they are faster with."""
    layers = [nn.Linear(1024, outputs, bias=False) for outputs in (1536, 2048, 1536, 4096)]
    model = nn.Sequential(*layers)
    mx.eval(model.parameters())
    direct.install(model)
    asked: list[tuple[int, int]] = []

    def most(weights: list[mx.array]) -> int:
        asked.append((weights[0].shape[0], len(weights)))
        return 0 if weights[0].shape[0] == 2048 else 4

    monkeypatch.setattr(tiled, "most_tokens", most)
    tiled.install(model)
    assert sorted(asked) == [(1536, 2), (2048, 1), (4096, 1)]
    assert [type(layer) is TiledDirectLinear for layer in layers] == [True, False, True, True]


def test_a_weight_that_lies_as_its_transpose_is_left() -> None:
    """As those of upstream's GPT-2: MLX would copy each tile in each call."""
    layer = nn.Linear(1024, 2048, bias=False)
    layer.weight = mx.random.normal((1024, 2048)).T
    mx.eval(layer.weight)
    model = nn.Sequential(layer)
    direct.install(model)
    mx.eval(layer.weight)
    assert strides(layer.weight)[0] == 4
    tiled.install(model)
    assert type(layer) is direct.DirectLinear


@pytest.mark.parametrize("kind", ["small", "bfloat16"])
def test_nothing_is_tried_for_models_without_large_float32_weights(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tiled, "most_tokens", asked.append)
    layer = nn.Linear(1024, 64 if kind == "small" else 2048, bias=False)
    if kind == "bfloat16":
        layer.set_dtype(mx.bfloat16)
    model = nn.Sequential(layer)
    direct.install(model)
    tiled.install(model)
    assert not asked
    assert type(layer) is direct.DirectLinear


def test_the_trial_reads_other_lines_each_time() -> None:
    """More of them than a product could have without a copy, and whole tiles."""
    weights = [mx.arange(begin, begin + 16384)[:, None] * mx.ones((1, 1024), mx.float32) for begin in (0, 16384)]
    some = list(islice(tiled._parts(weights), 8))
    assert {int(part[0, 0].item()) for part in some} == {0, 3840, 7680, 11520, 16384, 20224, 24064, 27904}
    assert all(part.shape == (3840, 1024) for part in some)
    assert next(tiled._parts([mx.zeros((1000, 2000))])).shape == (1000, 2000)
    assert Tiles(weights[0], 4).product(mx.ones((5, 1024))) is None
