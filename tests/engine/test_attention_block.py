"""Decode steps that attend to what one product of queries, keys and values has, as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine import attention_block
from runner.engine.kv import attention_kernel, quantised_kernel
from runner.engine.kv.calls import JoinedCall, Launch, Planes
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import JoinedPackedCall
from runner.engine.loader import load
from tests.engine.conftest import ModelFolder
from tests.engine.kv.launches import packed_separately, packed_separately_joined, separately, separately_joined
from tests.engine.speculative.drafts import SLACK, draft_folder
from tests.engine.test_products import joined
from tests.engine.test_traced import answers, sources


class Joined:
    """A launch for what is joined, by MLX's operations, as if there were a device; counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
        monkeypatch.setattr(attention_kernel, "joined_launch", self._launch)
        monkeypatch.setattr(attention_kernel, "applies_joined", lambda dtype, tokens, *form: tokens <= 16)

    def _launch(self, launch: Launch | None) -> object:
        return self._attend if launch is separately else None

    def _attend(self, call: JoinedCall) -> tuple[mx.array, Planes]:
        self.calls += 1
        return separately_joined(call)


@pytest.mark.parametrize(
    ("model_type", "layers"), [("llama", 3), ("qwen3", 0), ("gemma3_text", 0), ("qwen3_moe", 0), ("lfm2", 0)]
)
def test_which_attentions_are_the_usual_one(model_folder: ModelFolder, model_type: str, layers: int) -> None:
    """Those that norm queries and keys are not, nor are others' parts."""
    model = joined(model_folder(model_type))
    assert attention_block.install(model) == layers
    assert attention_block.install(model) == 0, "once"


def test_packed_weights_are_no_matter(model_folder: ModelFolder) -> None:
    model = joined(model_folder("llama", 4))
    assert attention_block.install(model) == 3


def test_an_attention_that_computes_something_else_is_left_alone(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = joined(model_folder("llama"))
    for layer in model.layers:
        layer.self_attn.n_kv_heads = layer.self_attn.n_heads
    kind = type(model.layers[0].self_attn)
    upstream = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x, mask=None, cache=None: 2 * upstream(self, x, mask, cache))
    assert attention_block.install(model) == 0


@pytest.mark.parametrize("drafted", [False, True])
def test_rows_say_the_same(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drafted: bool
) -> None:
    """Plain rows and those with adapters, that come and go, in steps and in rounds."""
    folder = model_folder("llama")
    draft = draft_folder(folder, tmp_path / "draft", "perturbed") if drafted else None
    adapters = sources(load(folder), tmp_path)
    expected = answers(load(folder, slack=SLACK), draft, adapters)
    launches = Joined(monkeypatch)
    assert answers(load(folder, slack=SLACK), draft, adapters) == expected
    assert launches.calls > 100


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_few_bits_say_the_same(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int
) -> None:
    folder, how, calls = model_folder("llama", wide=True), Quantisation(bits, 32), []
    adapters = sources(load(folder), tmp_path)
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    monkeypatch.setattr(quantised_kernel, "launch", lambda: packed_separately)
    expected = answers(load(folder, slack=SLACK, quantisation=how), None, adapters)
    Joined(monkeypatch)

    def noted(call: JoinedPackedCall) -> tuple[mx.array, Sequence[mx.array]]:
        calls.append(call.joined.shape)
        return packed_separately_joined(call)

    monkeypatch.setattr(
        quantised_kernel, "joined_launch", lambda launch: noted if launch is packed_separately else None
    )
    assert answers(load(folder, slack=SLACK, quantisation=how), None, adapters) == expected
    assert len(calls) > 100


def test_a_step_has_no_views_between_product_and_attention(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Joined(monkeypatch)
    loaded = load(model_folder("llama"))
    caches = loaded.layout.new(2)
    caches.call(loaded.model, mx.array([[5, 6, 7], [5, 6, 8]]), [3, 2])
    seen = []
    attend = launches._attend

    def noted(call: JoinedCall) -> tuple[mx.array, Planes]:
        seen.append(call.joined.shape)
        return attend(call)

    monkeypatch.setattr(launches, "_attend", noted)
    caches.call(loaded.model, mx.array([[9], [9]]))
    attention = loaded.model.layers[0].self_attn
    width = sum(attention.together.outputs)
    assert seen == [(2, 1, width)] * 3
    seen.clear()
    caches.call(loaded.model, mx.array([[9] * 20] * 2))
    assert not seen, "prompts attend as ever"
