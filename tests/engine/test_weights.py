"""The narrow way to load weights equals upstream's, and is not taken where they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from runner.engine.narrow import NotNarrow
from runner.engine.weights import _model_classes, narrow_model
from tests.engine.conftest import ModelFolder
from tests.engine.tiny import CONFIGS, build_model, encode

PROMPT = mx.array([encode("hello world, how are you")])


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def assert_equals_upstream(folder: Path) -> None:
    from mlx_lm.utils import load_model

    ours = narrow_model(folder, config_of(folder))
    theirs, _ = load_model(folder)
    mine, upstream = dict(tree_flatten(ours.parameters())), dict(tree_flatten(theirs.parameters()))
    assert mine.keys() == upstream.keys()
    for name, array in mine.items():
        assert array.dtype == upstream[name].dtype
        assert mx.array_equal(array, upstream[name]), name
    assert mx.array_equal(ours(PROMPT), theirs(PROMPT))


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("bits", [0, 4])
def test_equals_upstream(model_folder: ModelFolder, model_type: str, bits: int) -> None:
    assert_equals_upstream(model_folder(model_type, bits))


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_other_packings(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    repack(build_model(tmp_path), {}, mode=mode, bits=bits, group_size=group_size)
    assert_equals_upstream(tmp_path)


def test_layers_with_packings_of_their_own(tmp_path: Path) -> None:
    own = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}, "lm_head": False}
    repack(build_model(tmp_path), own, mode="affine", bits=4, group_size=32)
    assert_equals_upstream(tmp_path)


def test_a_packing_that_the_map_does_not_name_is_read_from_the_weights(tmp_path: Path) -> None:
    own = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}
    repack(build_model(tmp_path), own, mode="affine", bits=4, group_size=32)
    config = config_of(tmp_path)
    del config["quantization"]["model.layers.0.mlp.down_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equals_upstream(tmp_path)


def repack(folder: Path, own: dict[str, Any], **packing: Any) -> None:
    """Quantise a folder's weights in place; `own` names layers with another packing, or none."""
    model = narrow_model(folder, config_of(folder))

    def choose(path: str, module: nn.Module) -> Any:
        return own.get(path, hasattr(module, "to_quantized"))

    nn.quantize(model, **packing, class_predicate=choose)
    weights = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = config_of(folder) | {"quantization": {**packing, **own}}
    (folder / "config.json").write_text(json.dumps(config))


def test_several_files(tmp_path: Path) -> None:
    build_model(tmp_path)
    weights = dict(mx.load(str(tmp_path / "model.safetensors")))
    mx.eval(weights)
    (tmp_path / "model.safetensors").unlink()
    for part, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        mx.save_safetensors(
            str(tmp_path / f"model-0000{part + 1}-of-00002.safetensors"), {name: weights[name] for name in names}
        )
    assert_equals_upstream(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "packed by another tool"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "packed by another tool"),
        ({"model_file": "model.py"}, "model_file"),
        ({"quantize_activations": True}, "quantize_activations"),
        ({"model_type": "mistral"}, "no model file is called mistral"),
        ({"model_type": "bailing_hybrid"}, "resolved by the full loader"),
        ({"model_type": "../evil"}, "resolved by the full loader"),
        ({"model_type": "muse_spark"}, "its own chat template"),
    ],
)
def test_goes_the_full_way_where_upstream_does_more(
    model_folder: ModelFolder, config: dict[str, Any], reason: str
) -> None:
    folder = model_folder("llama")
    with pytest.raises(NotNarrow, match=reason):
        narrow_model(folder, config_of(folder) | config)


def test_tensor_wide_scales_go_the_full_way(tmp_path: Path) -> None:
    build_model(tmp_path)
    mx.save_safetensors(str(tmp_path / "model-scales.safetensors"), {"lm_head.global_scale": mx.ones((1,))})
    with pytest.raises(NotNarrow, match="tensor-wide"):
        narrow_model(tmp_path, config_of(tmp_path))


def test_missing_and_surplus_weights_are_errors(tmp_path: Path) -> None:
    build_model(tmp_path)
    weights = dict(mx.load(str(tmp_path / "model.safetensors")))
    mx.eval(weights)
    del weights["model.norm.weight"]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        narrow_model(tmp_path, config_of(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\*\.safetensors"):
        narrow_model(tmp_path, config_of(tmp_path))


def test_every_model_type_resolves_to_upstreams_class() -> None:
    """What upstream remaps by name or by architecture must not be resolved here."""
    from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING, _get_classes

    cases: list[dict[str, Any]] = [{"model_type": name} for name in [*MODEL_REMAPPING, *CONFIGS, "gemma2", "phi3"]]
    cases += [{"model_type": t, "architectures": [a]} for t, a in MODEL_ARCHITECTURE_REMAPPING]
    for config in cases:
        try:
            ours = _model_classes(config)
        except NotNarrow:
            continue
        assert ours == _get_classes(config), config
