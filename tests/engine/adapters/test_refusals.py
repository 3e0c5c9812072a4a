"""Every adapter that cannot be used is refused with its reason, and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.formats import AdapterRefusal
from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx, write_peft
from tests.engine.conftest import ModelFolder
from tests.engine.tiny import encode

Q0 = "model.layers.0.self_attn.q_proj"
Pairs = dict[str, tuple[mx.array, mx.array]]
PROMPT = mx.array([encode("hello world")])


def rewrite(folder: Path, file: str, change: Callable[[dict[str, mx.array]], None]) -> Path:
    """Change the tensors of an adapter's file."""
    tensors = dict(mx.load(str(folder / file)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(folder / file), tensors)
    return folder


def mlx_without(name: str) -> Callable[[Path, Pairs], Path]:
    return lambda path, pairs: rewrite(write_mlx(path, pairs), "adapters.safetensors", lambda t: t.__delitem__(name))


def mlx_with(name: str, shape: tuple[int, ...]) -> Callable[[Path, Pairs], Path]:
    return lambda path, pairs: rewrite(
        write_mlx(path, pairs), "adapters.safetensors", lambda t: t.update({name: mx.ones(shape)})
    )


def mlx_nan(path: Path, pairs: Pairs) -> Path:
    def poison(tensors: dict[str, mx.array]) -> None:
        tensors[f"{Q0}.lora_b"][1, 3] = mx.nan

    return rewrite(write_mlx(path, pairs), "adapters.safetensors", poison)


def truncated(path: Path, pairs: Pairs) -> Path:
    file = write_mlx(path, pairs) / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return path


def no_tensor_file(path: Path, pairs: Pairs) -> Path:
    (write_mlx(path, pairs) / "adapters.safetensors").unlink()
    return path


def config_is(text: str) -> Callable[[Path, Pairs], Path]:
    def make(path: Path, pairs: Pairs) -> Path:
        (write_mlx(path, pairs) / "adapter_config.json").write_text(text)
        return path

    return make


def without_scale(path: Path, pairs: Pairs) -> Path:
    return config_is(json.dumps({"num_layers": 2, "lora_parameters": {"rank": 4, "alpha": 8}}))(path, pairs)


def pickled(path: Path, pairs: Pairs) -> Path:
    folder = write_peft(path, pairs)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def peft(**config: object) -> Callable[[Path, Pairs], Path]:
    return lambda path, pairs: write_peft(path, pairs, **config)


def peft_without(name: str) -> Callable[[Path, Pairs], Path]:
    return lambda path, pairs: rewrite(
        write_peft(path, pairs), "adapter_model.safetensors", lambda t: t.__delitem__(name)
    )


def peft_with(name: str) -> Callable[[Path, Pairs], Path]:
    return lambda path, pairs: rewrite(
        write_peft(path, pairs), "adapter_model.safetensors", lambda t: t.update({name: mx.ones((4, 4))})
    )


REFUSED: dict[str, tuple[Callable[[Path, Pairs], Path], str]] = {
    "no folder": (lambda path, pairs: path, "is not a folder"),
    "no config": (lambda path, pairs: path.mkdir() or path, "adapter_config.json is missing"),
    "broken config": (config_is("{"), "cannot be read"),
    "config is a list": (config_is("[]"), "is not an object"),
    "no parameters": (config_is("{}"), "no lora_parameters"),
    "alpha in place of scale": (without_scale, "lora_parameters.scale is missing"),
    "no tensor file": (no_tensor_file, "adapters.safetensors is missing"),
    "truncated file": (truncated, "not a readable safetensors file"),
    "full fine-tune": (lambda path, pairs: write_mlx(path, pairs, fine_tune_type="full"), "fine_tune_type 'full'"),
    "nothing in it": (lambda path, pairs: write_mlx(path, {}), "would change nothing"),
    "half a pair": (mlx_without(f"{Q0}.lora_b"), f"{Q0}.lora_b is missing"),
    "a listed layer is missing": (
        lambda path, pairs: write_mlx(path, {p: pair for p, pair in pairs.items() if p != Q0}),
        f"{Q0} is listed in adapter_config.json, but has no tensors",
    ),
    "not a number": (mlx_nan, f"{Q0}.lora_b holds a value that is not finite"),
    "other tensors": (mlx_with("model.norm.weight", (64,)), "model.norm.weight is not an adapter tensor"),
    "magnitude without dora": (mlx_with(f"{Q0}.m", (64,)), "does not say dora"),
    "wrong input width": (mlx_with(f"{Q0}.lora_a", (48, 4)), f"{Q0}: the adapter maps 48 to 64"),
    "wrong output width": (mlx_with(f"{Q0}.lora_b", (4, 32)), f"{Q0}: the adapter maps 64 to 32"),
    "ranks differ": (mlx_with(f"{Q0}.lora_b", (5, 64)), f"{Q0}: lora_a and lora_b do not multiply"),
    "a layer beyond the model": (
        lambda path, pairs: write_mlx(path, {"model.layers.9.self_attn.q_proj": pairs[Q0]}),
        "the model has 3 blocks only",
    ),
    "another model's layer": (
        lambda path, pairs: write_mlx(path, {"model.layers.0.attention.wqkv": pairs[Q0]}),
        "the model has no such layer",
    ),
    "an embedding": (
        lambda path, pairs: write_mlx(path, {"model.embed_tokens": pairs[Q0]}),
        "model.embed_tokens is an embedding",
    ),
    "a norm": (lambda path, pairs: write_mlx(path, {"model.norm": pairs[Q0]}), "model.norm is a RMSNorm"),
    "dora without magnitudes": (
        lambda path, pairs: write_mlx(path, pairs, fine_tune_type="dora"),
        ".m is missing",
    ),
    "dora with a short magnitude": (
        lambda path, pairs: write_mlx(path, pairs, magnitudes={p: mx.ones((3,)) for p in pairs}),
        "the magnitude has shape (3,)",
    ),
    "peft: another method": (peft(peft_type="LOHA"), "peft_type LOHA is not supported"),
    "peft: whole layers": (peft(modules_to_save=["lm_head"]), "modules_to_save"),
    "peft: biases": (peft(bias="all"), "bias 'all'"),
    "peft: lora biases": (peft(lora_bias=True), "lora_bias"),
    "peft: transposed weights": (peft(fan_in_fan_out=True), "fan_in_fan_out"),
    "peft: pissa": (peft(init_lora_weights="pissa_niter_16"), "also changed the base model"),
    "peft: a pickle": (pickled, "adapter_model.bin is a pickle"),
    "peft: half a pair": (peft_without(f"base_model.model.{Q0}.lora_A.weight"), f"{Q0}.lora_A is missing"),
    "peft: embedding tensors": (
        peft_with("base_model.model.model.embed_tokens.lora_embedding_A"),
        "lora_embedding_A is not a LoRA tensor of a linear layer",
    ),
    "peft: rank differs from config": (peft(r=8), "has rank 4, adapter_config.json says 8"),
    "peft: no alpha": (peft(lora_alpha=None), "lora_alpha is missing"),
    "peft: dora without magnitudes": (peft(use_dora=True), "lora_magnitude_vector is missing"),
}


@pytest.fixture(scope="module")
def loaded(model_folder: ModelFolder) -> LoadedModel:
    return load(model_folder("llama"))


@pytest.fixture(scope="module")
def pairs(loaded: LoadedModel) -> Pairs:
    drawn = draw(linear_shapes(loaded, ATTENTION), 4, 1)
    mx.eval(drawn)
    return drawn


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(tmp_path: Path, loaded: LoadedModel, pairs: Pairs, name: str) -> None:
    make, reason = REFUSED[name]
    folder = make(tmp_path / "adapter", pairs)
    bank = AdapterBank(loaded.model, loaded.dtype)
    before = loaded.model(PROMPT)
    modules = {path: id(module) for path, module in loaded.model.named_modules()}

    with pytest.raises(AdapterRefusal) as refusal:
        bank.load(AdapterSource("a", str(folder)))

    assert reason in refusal.value.message
    assert bank.keys == []
    assert {path: id(module) for path, module in loaded.model.named_modules()} == modules
    assert mx.array_equal(loaded.model(PROMPT), before)


def test_a_refusal_leaves_the_resident_adapters_as_they_are(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    pairs = draw(linear_shapes(loaded, ATTENTION), 4, 1)
    bank = AdapterBank(loaded.model, loaded.dtype)
    bank.load(AdapterSource("good", str(write_mlx(tmp_path / "good", pairs))))
    held = bank.nbytes

    with pytest.raises(AdapterRefusal):
        bank.load(AdapterSource("bad", str(mlx_nan(tmp_path / "bad", pairs))))

    assert bank.keys == ["good"]
    assert bank.nbytes == held


@pytest.mark.parametrize(
    ("scale", "a", "dtype", "reason"),
    [
        (1.0, 1e5, mx.float16, f"{Q0}: lora_a holds a value that is not finite in float16"),
        (1e6, 1.0, mx.float16, f"{Q0}: lora_b, times its scale, holds a value that is not finite in float16"),
        (1e39, 1.0, mx.bfloat16, f"{Q0}: lora_b, times its scale, holds a value that is not finite in bfloat16"),
        (float("inf"), 1.0, mx.float32, f"{Q0}: lora_b, times its scale, holds a value that is not finite in float32"),
        (1e6, 1.0, mx.float32, None),
        (1.0, 1e5, mx.bfloat16, None),
    ],
)
def test_values_that_the_model_s_type_does_not_hold_are_refused(
    model_folder: ModelFolder, tmp_path: Path, scale: float, a: float, dtype: mx.Dtype, reason: str | None
) -> None:
    """Finite as they are in the file: others' rows are multiplied by them too."""
    pairs = {Q0: (mx.full((64, 4), a), mx.ones((4, 64)))}
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", pairs, keys=None, scale=scale)))
    bank = AdapterBank(load(model_folder("llama")).model, dtype)
    if reason is None:
        bank.load(source)
        assert bank.keys == ["a"]
        return
    with pytest.raises(AdapterRefusal) as refusal:
        bank.load(source)
    assert reason in refusal.value.message
    assert bank.nbytes == 0
