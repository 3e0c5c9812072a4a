"""Adapters on mixture-of-experts layers against upstream's LoRASwitchLinear."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.check import adaptable_modules, layer_shape
from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import ATTENTION, write_mlx
from tests.engine.adapters.test_bank import batch_logits, upstream_logits
from tests.engine.conftest import ModelFolder
from tests.engine.tiny import encode

EXPERTS = ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj")
KEYS = (*EXPERTS, *ATTENTION)


def draw_experts(loaded: LoadedModel, rank: int, seed: int) -> dict[str, tuple[mx.array, mx.array]]:
    """As mlx-lm stores them: A [experts, r, in] and B [experts, out, r]; [in, r] and [r, out] for attention."""
    key = mx.random.key(seed)
    drawn = {}
    for path, module in sorted(adaptable_modules(loaded.model).layers.items()):
        if not path.endswith(KEYS):
            continue
        experts, inputs, outputs = layer_shape(module)
        key, one, two = mx.random.split(key, 3)
        shapes = ((*experts, rank, inputs), (*experts, outputs, rank)) if experts else ((inputs, rank), (rank, outputs))
        drawn[path] = (
            mx.random.normal(shapes[0], key=one) / inputs**0.5,
            mx.random.normal(shapes[1], key=two) / rank**0.5,
        )
    return drawn


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("length", [3, 40], ids=["unsorted", "sorted by expert"])
def test_rows_with_different_experts_adapters_equal_upstream_runs(
    model_folder: ModelFolder, tmp_path: Path, bits: int, length: int
) -> None:
    folder = model_folder("qwen3_moe", bits)
    loaded = load(folder)
    bank = AdapterBank(loaded.model, loaded.dtype)
    adapters = {
        name: write_mlx(tmp_path / name, draw_experts(loaded, rank, rank), keys=KEYS, rank=rank)
        for name, rank in [("a", 4), ("b", 2)]
    }
    for name, path in adapters.items():
        bank.load(AdapterSource(name, str(path)))
    text = encode("the quick brown fox jumps over the lazy dog, números, größe, naïve café" * 8)
    prompts = [text[:length], text[length : 2 * length], text[5 : 5 + length]]
    assert all(len(prompt) == length for prompt in prompts)

    mixed = batch_logits(loaded, bank, ["a", "b", ""], prompts)

    for row, name in enumerate(["a", "b"]):
        expected = upstream_logits(folder, adapters[name], prompts[row])
        assert mx.allclose(mixed[row], expected, rtol=1e-4, atol=1e-4), name
    plain = load(folder).model(mx.array([prompts[2]]))[0, -1]
    assert mx.allclose(mixed[2], plain, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_may_change_other_layers_of_a_block(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("qwen3_moe")
    loaded = load(folder)
    bank = AdapterBank(loaded.model, loaded.dtype)
    drawn = draw_experts(loaded, 4, 3)
    gates = {path: pair for path, pair in drawn.items() if path.endswith(EXPERTS[0])}
    downs = {path: pair for path, pair in drawn.items() if path.endswith(EXPERTS[2])}
    first = write_mlx(tmp_path / "a", gates, keys=EXPERTS[:1], rank=4)
    second = write_mlx(tmp_path / "b", downs, keys=EXPERTS[2:], rank=4)
    bank.load(AdapterSource("a", str(first)))
    bank.load(AdapterSource("b", str(second)))
    prompt = encode("the quick brown fox")

    mixed = batch_logits(loaded, bank, ["a", "b"], [prompt, prompt])

    assert mx.allclose(mixed[0], upstream_logits(folder, first, prompt), rtol=1e-4, atol=1e-4)
    assert mx.allclose(mixed[1], upstream_logits(folder, second, prompt), rtol=1e-4, atol=1e-4)
