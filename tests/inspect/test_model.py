"""What a folder says about itself: what stays in memory, how it is packed, and that damage is told and never raised."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from runner.inspect.adapter import read_adapter
from runner.inspect.config import Config, Packing
from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.fit import misfit
from runner.inspect.model import ModelFacts, read_model
from runner.inspect.tensors import read_tensors
from runner.inspect.tokenizer import read_tokenizer
from runner.inspect.weights import activation_itemsize, resident_bytes
from runner.plan.digests import model_digest
from tests.inspect.folders import (
    GEOMETRY,
    Tensors,
    llama_tensors,
    queries,
    write_llama,
    write_lora,
    write_peft,
    write_tensors,
)
from tests.plan.folders import write


def facts(folder: Path) -> ModelFacts:
    return read_model(folder, str(folder), DigestCache())


def with_tensors(folder: Path, extra: Tensors, **config: Any) -> ModelFacts:
    write_llama(folder, **config)
    tensors = {**llama_tensors({**GEOMETRY, **config}), **extra}
    write_tensors(folder / "model.safetensors", tensors, "pt")
    return facts(folder)


def test_alike_tensors_are_one_group(tmp_path: Path) -> None:
    tensors = read_tensors(write_tensors(tmp_path / "model.safetensors", llama_tensors(GEOMETRY)))
    groups = {group.name: group for group in tensors.groups}
    up = groups["model.layers.*.mlp.up_proj.weight"]
    assert (up.dtype, up.shape, up.blocks, up.members) == ("BF16", (512, 256), 0b11, 2)
    assert (up.nbytes, up.values, up.example) == (2 * 2 * 512 * 256, 2 * 512 * 256, "model.layers.0.mlp.up_proj.weight")
    assert groups["lm_head.weight"].blocks == 0
    assert tensors.written_by == "mlx"
    assert tensors.nbytes == sum(group.nbytes for group in tensors.groups)


def test_shards_are_put_together(tmp_path: Path) -> None:
    write_llama(tmp_path)
    whole = facts(tmp_path)
    tensors = llama_tensors(GEOMETRY)
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2])):
        write_tensors(tmp_path / f"model-{number}.safetensors", {name: tensors[name] for name in part})
    assert sorted(facts(tmp_path).tensors) == sorted(whole.tensors)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vision_tower.blocks.0.weight", {}),
        ("model.visual.merger.mlp.0.weight", {}),
        ("multi_modal_projector.linear.weight", {}),
        ("mtp.layers.0.mlp.up_proj.weight", {}),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("model.layers.2.mlp.extra.weight", {}),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", {}),
    ],
)
def test_what_upstream_leaves_out_does_not_count(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    plain = with_tensors(tmp_path / "plain", {}, **config)
    more = with_tensors(tmp_path / "more", {name: ("F16", (64, 64))}, **config)
    assert resident_bytes(more.tensors, float32=False) == resident_bytes(plain.tensors, float32=False)


def test_a_tied_head_does_not_count(tmp_path: Path) -> None:
    tied = with_tensors(tmp_path / "tied", {"lm_head.weight": ("BF16", (300, 256))}, tie_word_embeddings=True)
    apart = with_tensors(tmp_path / "apart", {})
    assert resident_bytes(apart.tensors, float32=False) - resident_bytes(tied.tensors, float32=False) == 300 * 256 * 2


def test_types_in_memory(tmp_path: Path) -> None:
    extra = {"a": ("F32", (10,)), "b": ("U32", (10,)), "c.weight": ("F8_E4M3", (10, 10))}
    write_llama(tmp_path)
    write(tmp_path / "model.safetensors", _with_fp8(extra))
    found = facts(tmp_path)
    assert resident_bytes(found.tensors, float32=False) == 40 + 40 + 200
    assert resident_bytes(found.tensors, float32=True) == 40 + 40 + 400
    assert activation_itemsize(found.tensors, float32=False) == 4
    assert activation_itemsize(found.tensors, float32=True) == 4


def _with_fp8(tensors: Tensors) -> bytes:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "U32": 4, "F8_E4M3": 1}[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def test_packings_by_layer(tmp_path: Path) -> None:
    """Six bits for one layer, four for the others: the config says so by the layer's path."""
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block, bits in ((0, 4), (1, 6)):
        path = f"model.layers.{block}.self_attn.q_proj"
        packed[f"{path}.weight"] = ("U32", (256, 256 * bits // 32))
        packed[f"{path}.scales"] = packed[f"{path}.biases"] = ("BF16", (256, 256 // (64 if bits == 4 else 32)))
    quantization = {"bits": 4, "group_size": 64, "model.layers.1.self_attn.q_proj": {"bits": 6, "group_size": 32}}
    write_llama(tmp_path, quantization=quantization)
    write_tensors(tmp_path / "model.safetensors", packed)
    found = facts(tmp_path)
    assert found.config.quantization == Packing(4, 64)
    layers = found.linear_layers()
    assert [(layer.blocks, layer.inputs, layer.outputs) for layer in layers.linear] == [(1, 256, 256), (2, 256, 256)]
    assert layers.certain
    assert misfit(read_adapter(write_lora(tmp_path / "a", queries([0, 1]))), layers) == ""
    assert "maps 512 to 256" in misfit(read_adapter(write_lora(tmp_path / "b", queries([1], 512))), layers)


def test_experts_of_a_folder_from_the_hub_are_put_together(tmp_path: Path) -> None:
    experts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block in range(2):
        for expert in range(3):
            for name, shape in (("w1", (512, 256)), ("w2", (256, 512)), ("w3", (512, 256))):
                path = f"model.layers.{block}.block_sparse_moe.experts.{expert}.{name}.weight"
                experts[path] = ("BF16", shape)
    layers = with_tensors(tmp_path, experts, model_type="mixtral").linear_layers()
    mixed = {layer.path: layer for layer in layers.linear if "switch_mlp" in layer.path}
    prefix = "model.layers.*.block_sparse_moe.switch_mlp"
    assert set(mixed) == {f"{prefix}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert mixed[f"{prefix}.down_proj"][1:5] == (0b11, (3,), 512, 256)
    assert layers.certain


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    one = read_adapter(write_lora(tmp_path / "mlx", queries(range(2)), rank=8))
    other = read_adapter(write_peft(tmp_path / "peft", queries(range(2)), rank=8))
    assert one.changes == other.changes
    assert (one.rank, one.base, other.base) == (8, "", "org/base")


def test_a_nested_text_model(tmp_path: Path) -> None:
    nested = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 4, "model_type": "gemma3_text"}}
    config = Config({**nested, "vocab_size": 9, "max_position_embeddings": 7})
    assert (config.model_type, config.layers, config.vocabulary, config.max_context) == ("gemma3", 4, 9, 7)
    assert Config({"model_type": "mistral"}).architecture == "llama"


def test_a_tokenizer(tmp_path: Path) -> None:
    found = read_tokenizer(write_llama(tmp_path, tokens=["a"]))
    assert (found.size, found.chat_template) == (300, True)
    assert found.special == {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert read_tokenizer(tmp_path) == (0, {}, False)


def test_a_folder_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_llama(tmp_path), DigestCache()
    digest = model_digest(folder, cache).digest
    first = read_model(folder, digest, cache)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file is read"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("a file is read"))
    assert read_model(folder, digest, cache) is first


def test_any_damage_is_told(tmp_path: Path) -> None:
    """Bytes cut off, overwritten or swapped in every small file: a reason, or facts, and never a traceback."""
    rng = random.Random(3)
    folder = write_llama(tmp_path / "model")
    adapter = write_lora(tmp_path / "adapter", queries(range(2)))
    files = [folder / "config.json", folder / "tokenizer.json", folder / "tokenizer_config.json"]
    files += [folder / "model.safetensors", adapter / "adapter_config.json", adapter / "adapters.safetensors"]
    whole = {path: path.read_bytes()[:4000] for path in files}
    sizes = {path: path.stat().st_size for path in files}
    told = 0
    for _ in range(400):
        path = rng.choice(files)
        _damage(path, whole[path], rng)
        try:
            found = facts(folder)
            found.linear_layers()
            read_tokenizer(folder)
            misfit(read_adapter(adapter), found.linear_layers())
        except BadFolder as error:
            told += bool(error.message)
        path.write_bytes(whole[path])
        os.truncate(path, sizes[path])
    assert told > 100


def _damage(path: Path, content: bytes, rng: random.Random) -> None:
    """Once in three each: cut short, some bytes overwritten, or values of JSON replaced by others."""
    data = bytearray(content)
    match rng.randrange(3):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case _:
            for old in rng.sample([b"2", b"256", b"[", b'"llama"', b"true", b"{", b"shape", b"id"], 3):
                data = bytearray(
                    bytes(data).replace(old, rng.choice([b"null", b"-1", b'"x"', b"[]", b"{}", b"1e9"]), 2)
                )
    path.write_bytes(bytes(data))
