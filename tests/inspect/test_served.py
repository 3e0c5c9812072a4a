"""What is known of architectures beforehand is what the engine finds out when it tries a tiny model of each."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from runner.engine import layouts
from runner.engine.kv.attention import install
from runner.engine.kv.quantised import Quantisation
from runner.errors import EngineLoadError
from runner.inspect.architectures import cache_layout
from runner.inspect.config import Config
from runner.inspect.served import is_known_to_mlx_lm, is_served_alone, takes_quantised_cache
from tests.inspect.architectures import SPECIAL, build

WIDE = dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "v_head_dim"), 64)
WIDE |= dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 64)
WIDE |= dict.fromkeys(("hidden_size_per_head", "kv_channels"), 64)
WIDE |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "block_dim"), 256)
"""So that groups of 64 divide every head."""

TYPICAL = ("llama", "gemma2", "gemma3_text", "qwen3_moe", "deepseek_v3", "mamba", "mamba2", "phi", "gpt_oss")
NOT_TRIED = {"minicpm3", "phi3small"}
"""The first sample cannot be made wider alone; the block-sparse attention of the second takes minutes on a CPU."""


def _widened(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    wider = {key: WIDE[key] for key in config if key in WIDE}
    return wider | ({"text_config": {**nested, **{k: WIDE[k] for k in nested if k in WIDE}}} if nested else {})


def _check(model_type: str) -> None:
    mx.random.seed(0)
    config = {**SPECIAL[model_type], **build(model_type)[0]}
    stated, model = build(model_type, _widened(config))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    install(model)
    facts = Config(stated)
    layout, vocabulary, together = layouts.choose(model)
    assert is_known_to_mlx_lm(facts)
    assert together is not is_served_alone(facts)
    geometry = cache_layout(facts)
    assert layout.recurrent == geometry.recurrent
    if not layout.unknown:
        assert layout.trimmable == geometry.trimmable
        assert layout.windows == sorted(geometry.windows)
    try:
        layouts.quantised(model, Quantisation(8, 64), layout, vocabulary)
    except EngineLoadError:
        assert not (takes_quantised_cache(facts) and geometry.head_dims)
    else:
        assert takes_quantised_cache(facts)
        assert geometry.head_dims


@pytest.mark.mlx
@pytest.mark.parametrize("model_type", TYPICAL)
def test_typical_architectures(model_type: str) -> None:
    _check(model_type)


@pytest.mark.nightly
@pytest.mark.mlx
@pytest.mark.parametrize("model_type", sorted(SPECIAL.keys() - set(TYPICAL) - NOT_TRIED))
def test_every_architecture(model_type: str) -> None:
    _check(model_type)


@pytest.mark.parametrize("name", ["", "unheard_of", "../llama", ".", "base/llama"])
def test_an_architecture_that_mlx_lm_does_not_have(name: str) -> None:
    assert not is_known_to_mlx_lm(Config({"model_type": name}))
