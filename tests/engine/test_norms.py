"""Norms that keep their constants give what upstream's give, to the bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from runner.engine import norms
from runner.engine.norms import KeepingNorm
from tests.engine.drive import active_memory
from tests.engine.operations import with_views

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs have a kernel for it")


def pair(width: int, eps: float = 1e-5, dtype: mx.Dtype = mx.float32) -> tuple[nn.RMSNorm, nn.Sequential]:
    """A norm of upstream's, and a model of one with the same weight that keeps its constants if it may."""
    upstream, model = nn.RMSNorm(width, eps), nn.Sequential(nn.RMSNorm(width, eps))
    upstream.weight = model.layers[0].weight = mx.random.normal((width,)).astype(dtype)
    mx.eval(upstream.weight)
    norms.install(model)
    return upstream, model


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (4, 4), (2, 40)])
@pytest.mark.parametrize(("width", "eps"), [(256, 1e-5), (130, 1e-6), (7, 0.3)])
def test_a_norm_gives_the_same_bits(shape: tuple[int, int], width: int, eps: float) -> None:
    upstream, model = pair(width, eps)
    for scale in (1e-3, 1.0, 300.0):
        x = scale * mx.random.normal((*shape, width))
        assert mx.array_equal(model(x), upstream(x))


def test_it_brings_no_constants_to_a_shape_that_it_has_seen(tmp_path: Path) -> None:
    upstream, model = pair(64)
    for tokens in (1, 5):
        x = mx.ones((1, tokens, 64))
        mx.eval(x, model(x))
        before, now = with_views(tmp_path, upstream(x)), with_views(tmp_path, model(x))
        assert before.pop("Broadcast") == 4
        assert now.pop("Broadcast") == 1, "the scale of a token"
        assert now == before


def test_what_is_kept_takes_no_memory_and_is_no_parameter() -> None:
    _, model = pair(64)
    before = active_memory()
    for tokens in range(1, 40):
        mx.eval(model(mx.ones((1, tokens, 64))))
    assert active_memory() <= before
    assert len(model.layers[0].kept) == 16
    assert model.layers[0].parameters().keys() == {"weight"}


def test_other_types_are_left_to_upstream() -> None:
    upstream, model = pair(64, dtype=mx.bfloat16)
    assert type(model.layers[0]) is nn.RMSNorm
    kept = pair(64)[1].layers[0]
    assert type(kept) is KeepingNorm
    x = mx.random.normal((1, 2, 64)).astype(mx.bfloat16)
    upstream.weight = kept.weight
    assert kept(x).dtype == upstream(x).dtype
    assert mx.array_equal(kept(x), upstream(x))
