"""A folder that was quantised here against one of mlx_lm.convert, and against what was foretold of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.convert import convert as upstream_convert
from mlx_lm.utils import load_model

from runner.engine.conversion import Refused, convert
from runner.engine.loader import load
from runner.inspect.config import Packing
from runner.inspect.files import DigestCache
from runner.inspect.model import ModelFacts, read_model
from runner.inspect.quantize import Wanted, cast, converted_dtype, quantized
from tests.engine.tiny import WIDE, build_model, encode

pytestmark = pytest.mark.mlx

MODES = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
PROMPT = mx.array([encode("the quick brown fox")])
BY_LAYER: dict[str, Any] = {
    "*.lm_head": {"bits": 8, "group_size": 32, "mode": "affine"},
    "model.layers.1.*": {"bits": 6, "group_size": 64, "mode": "affine"},
    "*.down_proj": False,
}


def settings(mode: str = "affine", bits: int = 4, group_size: int = 64, **more: Any) -> dict[str, Any]:
    wanted = {
        "mode": mode,
        "bits": bits,
        "group_size": group_size,
        "layers": {},
        "dtype": "",
        "trust_remote_code": False,
    }
    return {**wanted, **more}


def converted(source: Path, target: Path, **wanted: Any) -> Path:
    convert(source, target, settings(**wanted), lambda done, of: None)
    return target


def logits(folder: Path) -> mx.array:
    """By upstream's own loader."""
    model, _ = load_model(folder)
    return model(PROMPT)


def upstream(source: Path, target: Path, mode: str, bits: int, group_size: int, **more: Any) -> Path:
    upstream_convert(str(source), str(target), True, group_size, bits, mode, **more)
    return target


def facts(folder: Path) -> ModelFacts:
    return read_model(folder, str(folder), DigestCache())


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_equals_upstreams_own(mode: str, bits: int, group_size: int, tmp_path: Path) -> None:
    source = build_model(tmp_path / "source")
    ours = converted(source, tmp_path / "ours", mode=mode, bits=bits, group_size=group_size)
    theirs = upstream(source, tmp_path / "theirs", mode, bits, group_size)
    assert mx.array_equal(logits(ours), logits(theirs))
    own, other = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    assert own["quantization"] == other["quantization"] == own["quantization_config"]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma3_text", "lfm2", "qwen3"])
def test_what_a_model_says_of_its_layers_holds(kind: str, tmp_path: Path) -> None:
    source = build_model(tmp_path / "source", kind, config={"torch_dtype": "bfloat16"})
    ours = converted(source, tmp_path / "ours", group_size=32)
    theirs = upstream(source, tmp_path / "theirs", "affine", 4, 32)
    assert mx.array_equal(logits(ours), logits(theirs))


def test_rules_of_layers(tmp_path: Path) -> None:
    source = build_model(tmp_path / "source")
    ours = converted(source, tmp_path / "ours", layers=BY_LAYER)

    def predicate(path: str, _: Any) -> bool | dict[str, Any]:
        if path == "lm_head":
            return {"bits": 8, "group_size": 32, "mode": "affine"}
        if path.startswith("model.layers.1."):
            return {"bits": 6, "group_size": 64, "mode": "affine"}
        return not path.endswith("down_proj")

    theirs = upstream(source, tmp_path / "theirs", "affine", 4, 64, quant_predicate=predicate)
    assert mx.array_equal(logits(ours), logits(theirs))
    assert not mx.array_equal(logits(ours), logits(converted(source, tmp_path / "plain")))


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_the_engine_loads_it_narrowly_and_as_foretold(mode: str, bits: int, group_size: int, tmp_path: Path) -> None:
    source = build_model(tmp_path / "source", config={**WIDE[""], "torch_dtype": "bfloat16"})
    ours = converted(source, tmp_path / "ours", mode=mode, bits=bits, group_size=group_size)
    loaded = load(ours)
    assert loaded.notes == ()
    assert loaded.model(PROMPT).dtype == mx.float32
    assert foretold(source, Wanted(Packing(bits, group_size, mode))) == packing_of(ours)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "lfm2"])
@pytest.mark.parametrize("layers", [{}, BY_LAYER])
def test_rules_are_foretold(kind: str, layers: dict[str, Any], tmp_path: Path) -> None:
    source = build_model(tmp_path / "source", kind)
    layers = layers if kind == "llama" else {}
    rules = {name: Packing(**rule) if rule else None for name, rule in layers.items()}
    ours = converted(source, tmp_path / "ours", group_size=32, layers=layers)
    assert foretold(source, Wanted(Packing(4, 32), rules)) == packing_of(ours)


def test_dtype(tmp_path: Path) -> None:
    source = build_model(tmp_path / "source", config={"torch_dtype": "bfloat16"})
    ours = converted(source, tmp_path / "ours", dtype="float16")
    weights = mx.load(str(ours / "model.safetensors"))
    assert {weights[name].dtype for name in weights if not name.endswith(".weight")} == {mx.float16}
    for dtype in ("float16", "bfloat16", "float32"):
        assert load(source, dtype=dtype).dtype == getattr(mx, dtype)
    assert load(source).dtype == mx.float32


REFUSALS: list[tuple[str, Callable[[Path], Path], dict[str, Any]]] = [
    ("quantised already", lambda path: build_model(path, bits=4), {}),
    (r"\*\.nothing matches no layer", build_model, {"layers": {"*.nothing": False}}),
]


@pytest.mark.parametrize(("reason", "build", "wanted"), REFUSALS)
def test_refused(reason: str, build: Callable[[Path], Path], wanted: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason):
        converted(build(tmp_path / "source"), tmp_path / "ours", **wanted)
    assert not (tmp_path / "ours").exists()


def foretold(source: Path, wanted: Wanted) -> dict[str, tuple[Any, ...]]:
    found = facts(source)
    dtype = converted_dtype(found.config, "")
    return by_name(quantized(cast(found, dtype) if dtype else found, wanted))


def packing_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    return by_name(facts(folder))


def by_name(found: ModelFacts) -> dict[str, tuple[Any, ...]]:
    """Type, shape and number of each kind of tensor, whatever the order."""
    groups: dict[str, tuple[Any, ...]] = {}
    for group in found.tensors:
        key = f"{group.name} {group.dtype} {group.shape}"
        _, members, nbytes = groups.get(key, (0, 0, 0))
        groups[key] = (group.blocks, members + group.members, nbytes + group.nbytes)
    return dict(sorted(groups.items()))
