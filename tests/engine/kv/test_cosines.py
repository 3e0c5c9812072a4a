"""Embeddings that share cosines and sines rotate as upstream's do, to the bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, Llama3RoPE, ProportionalRoPE, SuScaledRoPE, YarnRoPE

from runner.engine.kv import cosines
from runner.engine.kv.caches import Caches
from runner.engine.kv.cosines import fixed
from runner.engine.kv.layout import Layout
from tests.engine.drive import active_memory
from tests.engine.operations import operations
from tests.engine.tiny import CONFIGS

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs have a kernel for it")

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
ROPES: dict[str, Callable[[], nn.Module]] = {
    "usual": lambda: nn.RoPE(64, base=10000),
    "odd base": lambda: nn.RoPE(64, base=1234567.8, scale=1 / 3),
    "part": lambda: nn.RoPE(32, base=500000.0, scale=0.25),
    "neighbours": lambda: nn.RoPE(64, traditional=True),
    "part, neighbours": lambda: nn.RoPE(16, traditional=True, base=5e6),
    "llama3": lambda: Llama3RoPE(64, base=500000.0, scaling_config=LLAMA3),
    "yarn": lambda: YarnRoPE(48, scaling_factor=4.0),
    "yarn, neighbours": lambda: YarnRoPE(64, traditional=True, scaling_factor=40.0, mscale=0.7, mscale_all_dim=0.1),
    "longrope": lambda: SuScaledRoPE(48, long_factor=[1 + i / 9 for i in range(24)]),
    "proportional": lambda: ProportionalRoPE(64, 32, base=1e6, factor=2.0),
}

GLM4 = {
    "attention_bias": False,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_traditional": True,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 1),
    "llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0}, 1),
    "traditional": ("llama", {"rope_traditional": True}, 1),
    "qwen3": ("qwen3", {}, 1),
    "gemma3": ("gemma3_text", {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}, 2),
    "lfm2": ("lfm2", {}, 1),
    "glm4": ("glm4", {**CONFIGS["llama"], **GLM4}, 1),
}
"""The architecture, what is set, and how many rotations its layers share."""


class Attention(nn.Module):  # type: ignore[misc]
    """A module that has one."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope


def shared(rope: nn.Module) -> Any:
    """The same embedding, sharing."""
    cosines.install(Attention(rope))
    return rope


def lines(rows: int = 3, tokens: int = 5) -> mx.array:
    return mx.random.normal((rows, 4, tokens, 64))


def starting(starts: mx.array, tokens: int) -> mx.array:
    """Starts of a call of so many tokens."""
    return fixed(starts, int(starts.max().item()) + tokens)


def same(found: mx.array, expected: mx.array) -> bool:
    return bool(mx.array_equal(found, expected).item())


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_upstreams(name: str) -> None:
    near, far = (mx.array([5, 700, most], dtype=mx.int32) for most in (3795, 120000))
    offsets: list[Any] = [0, 7, 130001, near, far]
    rope = ROPES[name]()
    for tokens in (1, 5, 300):
        x = lines(tokens=tokens).transpose(0, 2, 1, 3).reshape(3, 4, tokens, 64)
        expected = [ROPES[name]()(x, offset=offset) for offset in offsets]
        shared(rope)
        for offset, rotated in zip(offsets, expected, strict=True):
            given = starting(offset, tokens) if isinstance(offset, mx.array) else offset
            assert same(rope(x, offset=given), rotated)
    assert type(rope).__name__.startswith("Sharing")


def test_what_was_made_for_others_is_not_taken() -> None:
    """Of other offsets, other lengths, other rows, in turn."""
    rope, plain = shared(nn.RoPE(64)), nn.RoPE(64)
    calls: list[tuple[int, int, Any]] = [
        (2, 1, 3),
        (2, 1, 4),
        (2, 5, 4),
        (1, 5, 4),
        (2, 5, starting(mx.array([4, 9]), 5)),
        (2, 5, starting(mx.array([4, 8]), 5)),
        (2, 1, starting(mx.array([4, 4]), 5)),
        (2, 1, 4),
    ]
    for rows, tokens, offset in calls + calls[::-1]:
        x = lines(rows, tokens)
        before = mx.array(offset) if isinstance(offset, mx.array) else offset
        assert same(rope(x, offset=offset), plain(x, offset=before))


def test_what_may_change_in_place_is_upstreams() -> None:
    rope, plain = shared(nn.RoPE(64)), nn.RoPE(64)
    offsets, x = mx.array([3, 9]), lines(2, 1)
    for _ in range(3):
        assert same(rope(x, offset=offsets), plain(x, offset=offsets))
        offsets += 1
    cache, before = BatchKVCache([0, 2]), BatchKVCache([0, 2])
    for _ in range(3):
        assert same(rope(x, offset=cache.offset), plain(x, offset=before.offset))
        for each in (cache, before):
            each.update_and_fetch(x, x)


def test_other_types_and_ways_are_upstreams() -> None:
    for x in (lines().astype(mx.bfloat16), lines()[0]):
        assert same(shared(nn.RoPE(64))(x, offset=3), nn.RoPE(64)(x, offset=3))
    yarn = YarnRoPE(64, scaling_factor=4.0)
    expected = yarn(lines_ := lines(), 3, 0.5, inverse=True)
    assert same(shared(yarn)(lines_, 3, 0.5, inverse=True), expected)


def test_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = DynamicNTKScalingRoPE(64, 512, False, 10000.0, 2.0)
    assert type(shared(dynamic)) is DynamicNTKScalingRoPE
    monkeypatch.setattr(cosines, "_on_cpu", lambda: False)
    assert type(shared(nn.RoPE(64))) is nn.RoPE
    starts = mx.array([1, 2])
    assert fixed(starts, 3) is starts


def built(name: str) -> Any:
    """A tiny model, the same each time."""
    architecture, config, _ = FAMILIES[name]
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(7)
    settings = {"model_type": architecture, "vocab_size": 97, **CONFIGS.get(architecture, {}), **config}
    return module.Model(module.ModelArgs.from_dict(settings))


def calls(model: Any) -> list[mx.array]:
    """Logits of a prompt's pieces, of steps, and of a round, for rows of one length and of several."""
    layout = Layout(model, slack=4)
    tokens = (mx.arange(2 * 60) % 97).reshape(2, 60)
    answers = []
    for lengths in ([40, 40], [40, 21]):
        caches = layout.new(2)
        answers.append(caches.call(model, tokens[:, :40], None if lengths[1] == 40 else lengths))
        answers += [caches.call(model, tokens[:, 40 + step : 41 + step]) for step in range(3)]
        if layout.trimmable:
            caches.mark()
            answers.append(caches.call(model, tokens[:, 50:54]))
            caches.keep(mx.array([1, 3], dtype=mx.int32))
            answers.append(caches.call(model, tokens[:, 55:56]))
    return answers


@pytest.mark.parametrize("name", FAMILIES)
def test_models_say_what_they_said(name: str) -> None:
    plain, sharing = built(name), built(name)
    cosines.install(sharing)
    for found, expected in zip(calls(sharing), calls(plain), strict=True):
        assert same(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
@pytest.mark.parametrize("far", [False, True])
def test_a_call_has_them_once(
    name: str, lengths: list[int], far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if far:
        monkeypatch.setattr(cosines, "_KEPT", 8)
    model = built(name)
    mx.eval(model.parameters())
    cosines.install(model)
    caches: Caches = Layout(model).new(2)
    mx.eval(caches.call(model, mx.ones((2, 9), dtype=mx.int32), lengths))
    graph = operations(tmp_path, caches.call(model, mx.ones((2, 1), dtype=mx.int32)))
    made = FAMILIES[name][2]
    assert (graph["Cos"], graph["Sin"]) == ((made, made) if far else (0, 0))
    looked_up = not far and lengths[0] != lengths[1]
    assert graph["Gather"] == 1 + (2 * made if looked_up else 0), "the first is that of the tokens"
    assert not graph["RoPE"]


def test_a_call_leaves_nothing_behind() -> None:
    model = built("gemma3")
    cosines.install(model)
    layout, tokens = Layout(model, slack=4), mx.ones((2, 50), dtype=mx.int32)
    mx.eval(model.parameters())
    mx.eval(layout.new(2).call(model, tokens[:, :1]))
    before = active_memory()
    for lengths in (None, [50, 20]):
        mx.eval(layout.new(2).call(model, tokens, lengths))
        assert active_memory() <= before
