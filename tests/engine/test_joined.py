"""Layers that are computed as one give what each gives by itself."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from runner.engine.joined import JoinedLayers, join_siblings, joined_of
from runner.engine.loader import load
from runner.engine.weights import narrow_model
from tests.engine.conftest import ModelFolder
from tests.engine.drive import active_memory

PROMPT = mx.array([[7, 3, 11, 20, 9], [4, 4, 8, 1, 30]])


class Block(nn.Module):
    """Three projections; `other` gives the third an input of its own."""

    def __init__(self, *, other: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 64, bias=bias), nn.Linear(32, 16, bias=bias)
        self.v_proj = nn.Linear(32, 16, bias=bias)
        self._other = other

    def __call__(self, x: mx.array) -> mx.array:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x * 2 if self._other else x)]
        return mx.concatenate(parts, axis=-1)


def unjoined(folder: Any) -> Any:
    """The model as upstream has it."""
    import json

    model = narrow_model(folder, json.loads((folder / "config.json").read_text()))
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize(
    ("model_type", "bits", "saved"),
    [("llama", 0, 9), ("llama", 4, 9), ("qwen3", 0, 6), ("gemma3_text", 0, 12), ("qwen3_moe", 0, 4), ("lfm2", 0, 2)],
)
def test_a_joined_model_computes_what_it_did(model_folder: ModelFolder, model_type: str, bits: int, saved: int) -> None:
    folder = model_folder(model_type, bits)
    model = unjoined(folder)
    expected = model(PROMPT)
    mx.eval(expected)

    assert join_siblings(model, lambda: model(PROMPT)) == saved

    assert mx.allclose(model(PROMPT), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_in_memory_once_and_activations_are_let_go(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    bytes_of_plain = sum(array.nbytes for _, array in tree_flatten(unjoined(folder).parameters()))
    before = active_memory()

    loaded = load(folder)
    mx.eval(loaded.model(PROMPT))

    assert active_memory() - before <= 1.05 * bytes_of_plain, "joined weights are a fifth of them"
    assert loaded.weights_bytes == pytest.approx(bytes_of_plain, rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
def test_parts_may_be_asked_for_in_any_order_and_again(bias: bool) -> None:
    layers = [nn.Linear(32, 64, bias=bias), nn.Linear(32, 16, bias=bias)]
    expected = [layer(PROMPT_VECTORS) for layer in layers]
    group = JoinedLayers(layers)

    for index in (1, 0, 0, 1, 1):
        assert mx.allclose(group.part(index, PROMPT_VECTORS), expected[index], atol=1e-5)


PROMPT_VECTORS = mx.random.normal((2, 5, 32), key=mx.random.key(3))


def test_siblings_with_different_inputs_are_parted_again() -> None:
    block = Block(other=True)
    expected = block(PROMPT_VECTORS)

    assert join_siblings(block, lambda: block(PROMPT_VECTORS)) == 0

    assert joined_of(block.q_proj) is None
    assert mx.array_equal(block(PROMPT_VECTORS), expected)


def test_siblings_that_differ_are_left_alone() -> None:
    block = Block()
    block.k_proj = nn.Linear(32, 16, bias=True)
    assert join_siblings(block, lambda: block(PROMPT_VECTORS)) == 0
    mixed = Block()
    mixed.v_proj = nn.QuantizedLinear.from_linear(nn.Linear(32, 16, bias=False), group_size=32, bits=8)
    assert join_siblings(mixed, lambda: mixed(PROMPT_VECTORS)) == 0
    packed = Block()
    for name, bits in (("q_proj", 4), ("k_proj", 4), ("v_proj", 8)):
        packed[name] = nn.QuantizedLinear.from_linear(packed[name], group_size=32, bits=bits)
    assert join_siblings(packed, lambda: packed(PROMPT_VECTORS)) == 0


def test_a_group_that_a_call_never_finished_starts_anew() -> None:
    block = Block()
    expected = block(PROMPT_VECTORS)
    join_siblings(block, lambda: block(PROMPT_VECTORS))
    block.q_proj(PROMPT_VECTORS + 1)  # a call that failed before it asked for the rest

    assert mx.allclose(block(PROMPT_VECTORS), expected, atol=1e-5)
