"""Every rule gives what mlx-lm's own caches hold, for a tiny model of the architecture."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.inspect.architectures import cache_layout
from runner.inspect.config import Config
from runner.inspect.files import BadFolder
from tests.inspect.architectures import SPECIAL, build, filled

NO_RULE = {"llama4"}
"""mlx-lm's cache for it cannot hold several rows, so the engine refuses it."""


@pytest.mark.mlx
@pytest.mark.parametrize("model_type", sorted(SPECIAL.keys() - NO_RULE))
def test_bytes_of_a_row(model_type: str) -> None:
    config, model = build(model_type)
    layout = cache_layout(Config(config))
    assert layout.known
    # Within a step of 256 and at the end of one, beyond every window; states have a type of their own.
    for tokens, dtype in ((300, mx.bfloat16), (768, mx.bfloat16), *([(300, mx.float32)] if layout.recurrent else [])):
        model.set_dtype(dtype)
        caches = filled(model, tokens - 1)
        model(mx.zeros((1, 1), dtype=mx.uint32), cache=caches)
        real = sum(cache.nbytes for cache in caches)
        assert layout.row_bytes(tokens, dtype.size) == pytest.approx(real, rel=0.03)


def test_an_architecture_without_a_rule_is_a_guess() -> None:
    geometry = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    layout = cache_layout(Config({"model_type": "new", **geometry}))
    assert (layout.known, layout.growing) == (False, 3 * 2 * 2 * 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "config.json has no num_hidden_layers"),
        ({"model_type": "llama", "num_hidden_layers": "3"}, "num_hidden_layers is '3', not a count"),
        ({"model_type": "openelm", "head_dim": 4, "num_kv_heads": 3}, "num_kv_heads is no list"),
        ({"model_type": "dbrx", "n_layers": 3}, "attn_config is missing"),
        (
            {"model_type": "nemotron-nas", "block_configs": [3], "hidden_size": 4, "num_attention_heads": 1},
            "does not fit a model of type 'nemotron-nas'",
        ),
    ],
)
def test_a_config_that_lacks_what_the_rule_needs(config: dict[str, object], message: str) -> None:
    with pytest.raises(BadFolder) as caught:
        cache_layout(Config(config))
    assert message in caught.value.message
