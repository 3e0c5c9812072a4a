"""What is predicted of a deployment's memory against what the engine then holds."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.kv.masks import FEW
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.sizes import grown
from runner.engine.loader import load
from runner.inspect import caches
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import DigestCache
from runner.inspect.memory import slots
from runner.inspect.model import ModelFacts, read_model
from tests.engine.drive import Driver, active_memory, generate
from tests.engine.tiny import CONFIGS, build_model, encode
from tests.inspect.folders import write_llama

LIMITS = Limits(rows=4, context=0, prefill_step=128, prefix_cache=0)
WIDER = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
"""So that caches are larger than what the allocator rounds up."""


def facts(folder: Path) -> ModelFacts:
    return read_model(folder, str(folder), DigestCache())


@pytest.mark.mlx
@pytest.mark.parametrize(("kind", "bits"), [*((kind, 0) for kind in CONFIGS), ("llama", 4), ("qwen3_moe", 8)])
def test_weights_are_what_the_engine_loads(kind: str, bits: int, tmp_path: Path) -> None:
    folder = build_model(tmp_path, kind, bits=bits)
    memory = model_memory(facts(folder), [], None, LIMITS, float32=True)
    assert memory.weights == load(folder).weights_bytes


@pytest.mark.mlx
def test_weights_are_what_is_in_use_after_loading(tmp_path: Path) -> None:
    folder = build_model(tmp_path, config={**WIDER, "hidden_size": 512, "intermediate_size": 512}, bits=4)
    before = active_memory()
    loaded = load(folder)
    held = active_memory() - before
    memory = model_memory(facts(folder), [], None, LIMITS, float32=True)
    assert memory.weights == loaded.weights_bytes == pytest.approx(held, rel=0.03)


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        *((kind, None) for kind in ("llama", "qwen3", "gemma3_text", "qwen3_moe")),
        *(("llama", Quantisation(8, 32, start)) for start in (0, 100, 300)),
        ("gemma3_text", Quantisation(8, 32, 150)),
    ],
    ids=str,
)
def test_caches_of_a_running_batch(kind: str, packing: Quantisation | None, tmp_path: Path) -> None:
    folder = build_model(tmp_path, kind, config={**WIDER, "sliding_window": 64} if "gemma" in kind else WIDER)
    driver = Driver(load(folder, quantisation=packing), max_rows=4, prefill_step_size=128, prefix_cache_bytes=0)
    prompt = (encode("hello world, how are you today? ") * 100)[:200]
    idle = active_memory()
    for number in range(4):
        driver.engine.submit(generate(number, prompt=[*prompt[number:], number + 20], max_tokens=40))
    while len(driver.engine._batch.rows) < 4:
        driver.engine.step()
    driver.engine.step()
    mx.clear_cache()
    real = active_memory() - idle
    limits = LIMITS._replace(context=241)
    if packing is not None:
        limits = limits._replace(kv_bits=packing.bits, kv_group_size=packing.group_size, kv_start=packing.start)
    memory = model_memory(facts(folder), [], None, limits, float32=True)
    assert memory.kv_max == pytest.approx(real, rel=0.03)
    driver.drain()


@pytest.mark.mlx
@pytest.mark.parametrize(("hidden", "inner", "step"), [(256, 640, 256), (128, 1024, 128)])
def test_the_peak_of_a_prefill_is_bounded(hidden: int, inner: int, step: int, tmp_path: Path) -> None:
    heads = hidden // 64
    geometry = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    geometry |= {"num_key_value_heads": heads // 2, "head_dim": 64, "num_hidden_layers": 2}
    folder = build_model(tmp_path, "llama", config={**geometry, "max_position_embeddings": 1024})
    driver = Driver(load(folder), prefill_step_size=step, prefix_cache_bytes=0)
    prompt = (encode("hello world, how are you today? ") * 100)[:512]
    driver.one(prompt=prompt[:10], max_tokens=2)
    idle = active_memory()
    # What was garbage is kept by MLX now, and a larger buffer that it uses again counts as a whole.
    mx.clear_cache()
    mx.reset_peak_memory()
    driver.one(prompt=prompt, max_tokens=1)
    real = mx.get_peak_memory() - idle
    memory = model_memory(facts(folder), [], None, LIMITS._replace(rows=1, prefill_step=step), float32=True)
    assert 0.6 * (memory.prefill + memory.kv_row) <= real <= 1.1 * (memory.prefill + memory.kv_row)


def test_the_terms_of_a_geometry(tmp_path: Path) -> None:
    """Those of Llama-3.1-8B: 131,072 bytes a token, by arithmetic that anybody can check."""
    large = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    large |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
    folder = write_llama(tmp_path / "large", **large)
    small = write_llama(tmp_path / "small", num_hidden_layers=1, max_position_embeddings=131072)
    limits = Limits(rows=2, context=1000, prefill_step=512, prefix_cache=7)
    memory = model_memory(facts(folder), [], facts(small), limits, float32=False)
    assert memory.weights == 8_030_261_248 * 2
    assert memory.kv_per_token == 131_072 + 512
    assert memory.kv_row == 1024 * memory.kv_per_token
    assert memory.kv_max == 2 * memory.kv_row
    assert memory.draft == sum(group.nbytes for group in facts(small).tensors)
    assert memory.most == memory.held + memory.kv_max + 7 + memory.prefill
    assert model_memory(facts(folder), [], None, limits, float32=True).weights == 2 * memory.weights
    quantised = model_memory(facts(folder), [], None, limits._replace(kv_bits=8), float32=False)
    packed = 65536 + 65536 // 64 * 4
    assert quantised.kv_per_token == packed
    drafted = model_memory(facts(folder), [], facts(small), limits._replace(kv_bits=8), float32=False)
    assert drafted.kv_per_token == packed + 512, "a draft's caches are as it makes them"
    late = model_memory(facts(folder), [], None, limits._replace(kv_bits=8, kv_start=500), float32=False)
    assert (late.kv_per_token, late.kv_row) == (packed, 1024 * packed + 516 * 131_072)
    assert late.first - late.prefill < 512 * 131_072 + 516 * 131_072 + 512 * packed
    never = model_memory(facts(folder), [], None, limits._replace(kv_bits=8, kv_start=1024), float32=False)
    assert never.kv_row == 1024 * never.kv_per_token == 1024 * 131_072


@pytest.mark.mlx
def test_room_for_rows_is_what_a_batch_has() -> None:
    held = 1
    for rows in range(1, 200):
        held = grown(held, rows)
        assert slots(rows) == held
    assert caches._BEHIND == FEW, "room behind a threshold"


def test_how_much_fits(tmp_path: Path) -> None:
    memory = model_memory(facts(write_llama(tmp_path)), [], None, LIMITS, float32=False)
    assert memory.context == 2048
    assert memory.rows_within(memory.most) == 4
    assert memory.rows_within(memory.held + memory.prefill + 2 * memory.kv_row) == 2
    assert memory.rows_within(memory.held) == 0
    half = memory.held + memory.prefill + memory.kv_row // 2
    assert memory.context_within(half) == 1024
    assert memory.context_within(memory.most) == 2048
    assert memory.context_within(0) == 0
