"""Embeddings leave their work to the launch, where a cache says so, and do it where it does not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from runner.engine.kv import rotary
from runner.engine.kv.rotary import Deferred, Unrotated, rotated

SCALED = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
ROPES = {
    "usual": lambda: nn.RoPE(64, base=10000.0),
    "part": lambda: nn.RoPE(32, base=500000.0, scale=0.25),
    "neighbours": lambda: nn.RoPE(64, traditional=True),
    "llama3": lambda: Llama3RoPE(64, base=500000.0, scaling_config=SCALED),
}


class Attention(nn.Module):  # type: ignore[misc]
    """A module that has one."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope


@pytest.mark.parametrize("name", ROPES)
def test_what_is_left_is_what_would_have_been_done(name: str) -> None:
    rope = ROPES[name]()
    lines = mx.random.normal((2, 3, 4, 64))
    starts = mx.array([5, 700], dtype=mx.int32)
    expected = rope(lines, offset=starts)
    rotary.install(Attention(rope))
    assert mx.array_equal(rope(lines, offset=starts), expected).item(), "with a number it rotates"
    left = rope(lines, offset=Deferred(starts))
    assert isinstance(left, Unrotated)
    assert left.lines is lines
    assert mx.array_equal(rotated(left), expected).item()
    how = left.rotation
    by_frequencies = mx.fast.rope(
        lines,
        how.dims,
        traditional=how.traditional,
        base=None,
        scale=1.0,
        offset=starts,
        freqs=1 / how.frequencies,
    )
    assert mx.allclose(by_frequencies, expected, atol=2e-3).item()


def test_embeddings_of_one_kind_share_their_frequencies() -> None:
    model = nn.Sequential(*(Attention(nn.RoPE(64)) for _ in range(2)), Attention(nn.RoPE(64, base=50.0)))
    rotary.install(model)
    first, second, other = (layer.rope.rotation.frequencies for layer in model.layers)
    assert first is second
    assert first is not other


def test_others_are_left_alone() -> None:
    rope = YarnRoPE(64)
    rotary.install(Attention(rope))
    assert type(rope) is YarnRoPE
