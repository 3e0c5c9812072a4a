"""Adapters of one batch against upstream's own loader, one model each."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.adapters import mixed
from runner.engine.adapters.bank import AdapterBank
from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx, write_peft
from tests.engine.conftest import ModelFolder
from tests.engine.drive import active_memory
from tests.engine.tiny import encode

EVERY_LINEAR = (*ATTENTION, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROMPTS = [encode("hello world, how are"), encode("the quick brown fox"), encode("def main(): return 42")]


def upstream_logits(folder: Path, adapter: Path, prompt: list[int]) -> mx.array:
    """Logits of upstream's model with the adapter loaded by upstream."""
    from mlx_lm.tuner.utils import load_adapters

    model = load(folder).model
    load_adapters(model, str(adapter))
    model.eval()
    return model(mx.array([prompt]))[0, -1]


def batch_logits(loaded: LoadedModel, bank: AdapterBank, keys: list[str], prompts: list[list[int]]) -> mx.array:
    """Last logits of several prompts of one length in one call, each with its own adapter, "" for none."""
    residents = [bank.acquire(key) if key else None for key in keys]
    bank.apply(bank.slots(residents))
    logits = loaded.model(mx.array(prompts))[:, -1]
    mx.eval(logits)
    bank.apply(None)
    for resident in residents:
        if resident is not None:
            bank.release(resident)
    return logits


def same_length(prompts: list[list[int]]) -> list[list[int]]:
    """Cut to the shortest, so that they make one array."""
    length = min(map(len, prompts))
    return [prompt[:length] for prompt in prompts]


@pytest.mark.parametrize(("model_type", "bits"), [("llama", 0), ("llama", 4), ("qwen3", 0), ("gemma3_text", 4)])
def test_rows_with_different_adapters_equal_upstream_runs(
    model_folder: ModelFolder, tmp_path: Path, model_type: str, bits: int
) -> None:
    folder = model_folder(model_type, bits)
    loaded = load(folder)
    bank = AdapterBank(loaded.model, loaded.dtype)
    plain = load(folder).model
    prompts = same_length(PROMPTS)
    first = write_mlx(tmp_path / "a", draw(linear_shapes(loaded, EVERY_LINEAR), 4, 1), keys=EVERY_LINEAR, scale=2.0)
    second = write_mlx(tmp_path / "b", draw(linear_shapes(loaded, ATTENTION), 7, 2), scale=0.5)
    loads = [bank.load(AdapterSource("a", str(first))), bank.load(AdapterSource("b", str(second)))]
    assert [info.rank for info in loads] == [4, 7]
    assert loads[0].layers == len(linear_shapes(load(folder), EVERY_LINEAR))

    mixed = batch_logits(loaded, bank, ["a", "", "b"], prompts)

    assert mx.allclose(mixed[0], upstream_logits(folder, first, prompts[0]), rtol=1e-4, atol=1e-4)
    assert mx.allclose(mixed[1], plain(mx.array([prompts[1]]))[0, -1], rtol=1e-4, atol=1e-4)
    assert mx.allclose(mixed[2], upstream_logits(folder, second, prompts[2]), rtol=1e-4, atol=1e-4)
    assert not mx.allclose(mixed[0], plain(mx.array([prompts[0]]))[0, -1], atol=0.5), "the adapter changes nothing"


@pytest.mark.parametrize("ranks", [256, 0], ids=["together", "by copies"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3"])
def test_prompts_on_cuda_need_no_gathering_product(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, ranks: int
) -> None:
    """Which would be compiled for a minute when the first prompt comes."""
    loaded = load(model_folder(model_type))
    bank = AdapterBank(loaded.model, loaded.dtype)
    shapes = linear_shapes(loaded, EVERY_LINEAR)
    for seed, name in enumerate("ab"):
        folder = write_mlx(tmp_path / name, draw(shapes, 4, seed), keys=EVERY_LINEAR)
        bank.load(AdapterSource(name, str(folder)))
    prompts = same_length(PROMPTS)
    expected = batch_logits(loaded, bank, ["a", "", "b"], prompts)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "gather_mm", None)
    monkeypatch.setattr(mixed, "_MOST_RANKS", ranks)
    assert mx.allclose(batch_logits(loaded, bank, ["a", "", "b"], prompts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [0, 4])
def test_dora_equals_upstream_and_mixes_with_lora(model_folder: ModelFolder, tmp_path: Path, bits: int) -> None:
    folder = model_folder("llama", bits)
    loaded = load(folder)
    bank = AdapterBank(loaded.model, loaded.dtype)
    shapes = linear_shapes(loaded, ATTENTION)
    magnitudes = {path: mx.random.uniform(0.5, 2.0, (out,), key=mx.random.key(5)) for path, (_, out) in shapes.items()}
    dora = write_mlx(tmp_path / "dora", draw(shapes, 4, 3), magnitudes=magnitudes, scale=1.5)
    lora = write_mlx(tmp_path / "lora", draw(shapes, 2, 4))
    bank.load(AdapterSource("lora", str(lora)))
    bank.load(AdapterSource("dora", str(dora)))
    prompts = same_length(PROMPTS)

    mixed = batch_logits(loaded, bank, ["dora", "lora", ""], prompts)

    assert mx.allclose(mixed[0], upstream_logits(folder, dora, prompts[0]), rtol=1e-4, atol=1e-4)
    assert mx.allclose(mixed[1], upstream_logits(folder, lora, prompts[1]), rtol=1e-4, atol=1e-4)
    assert mx.allclose(mixed[2], load(folder).model(mx.array([prompts[2]]))[0, -1], rtol=1e-4, atol=1e-4)


def test_scale_in_the_source_replaces_the_adapters_own(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    loaded = load(folder)
    pairs = draw(linear_shapes(loaded, ATTENTION), 4, 6)
    small = write_mlx(tmp_path / "small", pairs, scale=0.25)
    large = write_mlx(tmp_path / "large", pairs, scale=3.0)
    bank = AdapterBank(loaded.model, loaded.dtype)
    bank.load(AdapterSource("scaled", str(small), scale=3.0))

    logits = batch_logits(loaded, bank, ["scaled"], PROMPTS[:1])

    assert mx.allclose(logits[0], upstream_logits(folder, large, PROMPTS[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"alpha": 8.0}, 8.0 / 4),
        ({"alpha": 8.0, "use_rslora": True}, 8.0 / 2),
        ({"alpha": 3.0, "alpha_pattern": {"q_proj": 3.0}}, 3.0 / 4),
    ],
)
def test_a_peft_folder_equals_the_same_adapter_in_mlx_format(
    model_folder: ModelFolder, tmp_path: Path, config: dict[str, float], scale: float
) -> None:
    folder = model_folder("llama")
    loaded = load(folder)
    pairs = draw(linear_shapes(loaded, ATTENTION), 4, 7)
    bank = AdapterBank(loaded.model, loaded.dtype)
    bank.load(AdapterSource("peft", str(write_peft(tmp_path / "peft", pairs, **config))))
    native = write_mlx(tmp_path / "mlx", pairs, scale=scale)

    logits = batch_logits(loaded, bank, ["peft"], PROMPTS[:1])

    assert mx.allclose(logits[0], upstream_logits(folder, native, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_peft_patterns_set_rank_and_scale_by_module(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    queries = draw(linear_shapes(loaded, ["self_attn.q_proj"]), 2, 8)
    values = draw(linear_shapes(loaded, ["self_attn.v_proj"]), 4, 9)
    peft = write_peft(
        tmp_path / "peft", values | queries, alpha=8.0, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 1.0}
    )
    scaled = {path: (a, 0.5 * b) for path, (a, b) in queries.items()} | {
        path: (a, 2.0 * b) for path, (a, b) in values.items()
    }
    bank = AdapterBank(loaded.model, loaded.dtype)
    bank.load(AdapterSource("peft", str(peft)))
    bank.load(AdapterSource("mlx", str(write_mlx(tmp_path / "mlx", scaled, scale=1.0))))

    logits = batch_logits(loaded, bank, ["peft", "mlx"], [PROMPTS[0], PROMPTS[0]])

    assert mx.allclose(logits[0], logits[1], atol=1e-5)


def test_a_dropped_adapter_is_freed_when_its_last_row_ends(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    bank = AdapterBank(loaded.model, loaded.dtype)
    shapes = linear_shapes(loaded, EVERY_LINEAR)
    batch_logits(loaded, bank, ["", ""], same_length(PROMPTS)[:2])  # a call by itself leaves its cosines
    before = active_memory()
    sources = [
        AdapterSource(name, str(write_mlx(tmp_path / name, draw(shapes, rank, rank), keys=EVERY_LINEAR)))
        for name, rank in [("a", 4), ("b", 16), ("c", 2)]
    ]
    for source in sources:
        bank.load(source)
    expected = batch_logits(loaded, bank, ["a", "c"], same_length(PROMPTS)[:2])
    row = bank.acquire("b")
    assert row is not None
    bank.drop("b")
    assert bank.keys == ["a", "c"]
    assert bank.acquire("b") is None, "a dropped adapter takes no new rows"
    with_row = bank.nbytes
    version = bank.version

    bank.release(row)

    assert bank.version > version
    assert bank.nbytes < with_row / 4, "ranks shrink with the largest adapter gone"
    assert mx.array_equal(batch_logits(loaded, bank, ["a", "c"], same_length(PROMPTS)[:2]), expected)
    bank.drop("a")
    bank.drop("c")
    assert bank.nbytes == 0
    del expected
    assert active_memory() <= before


def test_loading_a_resident_adapter_again_changes_nothing(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    bank = AdapterBank(loaded.model, loaded.dtype)
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", draw(linear_shapes(loaded, ATTENTION), 4, 1))))
    first = bank.load(source)
    row = bank.acquire("a")
    bank.drop("a")

    assert bank.load(source) == first
    assert bank.keys == ["a"]
    assert row is not None
    bank.release(row)
    assert bank.acquire("a") is not None, "it was wanted again, so it stays when its old rows end"
