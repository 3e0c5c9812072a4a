"""What models keep for a row whose layers all attend to tokens: all of them, a window, or a latent of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from runner.inspect.caches import NOTHING, CacheLayout, attention, window
from runner.inspect.config import Config

Rule = Callable[[Config], CacheLayout]


def total(layers: Iterable[CacheLayout]) -> CacheLayout:
    return sum(layers, NOTHING)


# ------------------------------------------------------------------ attention


def plain(config: Config) -> CacheLayout:
    """Every layer alike, attention over all tokens."""
    return attention(config.kv_heads, config.head_dim) * config.layers


def all_heads(config: Config) -> CacheLayout:
    return attention(config.heads, config.hidden // config.heads) * config.layers


def multi_query(config: Config) -> CacheLayout:
    heads = 1 if config.get("multi_query") is not False else config.heads
    return attention(heads, config.head_dim) * config.layers


def per_layer_heads(config: Config) -> CacheLayout:
    return total(attention(int(heads), config.head_dim) for heads in config.items("num_kv_heads"))


def shared_heads(config: Config) -> CacheLayout:
    return attention(config.heads // config.count("n_shared_head", default=8), config.head_dim) * config.layers


def nested_heads(config: Config) -> CacheLayout:
    return attention(config.section("attn_config").count("kv_n_heads"), config.head_dim) * config.layers


def reused(config: Config) -> CacheLayout:
    return attention(config.kv_heads, config.head_dim) * (config.layers - config.count("num_kv_reuse_layers"))


def searched(config: Config) -> CacheLayout:
    """Blocks of a neural architecture search: some have no attention, others fewer heads."""
    blocks = [block["attention"] for block in config.items("block_configs")]
    used = [b for b in blocks if not b.get("no_op") and not b.get("replace_with_linear")]
    dim = config.hidden // config.heads
    return total(attention(config.heads // int(block["n_heads_in_group"]), dim) for block in used)


# ------------------------------------------------------------------ windows


def _sliding(config: Config, sliding: Iterable[bool]) -> CacheLayout:
    full = attention(config.kv_heads, config.head_dim)
    size = config.count("sliding_window", "window_size", "attention_window_size", default=0)
    return total(window(size, config.kv_heads, config.head_dim) if slides else full for slides in sliding)


def by_type(default: Callable[[int], str] = lambda _: "full_attention") -> Rule:
    """`layer_types` says it, or where that is missing `default` does for each layer's number."""

    def rule(config: Config) -> CacheLayout:
        types = config.layer_types(map(default, range(config.layers)))
        return _sliding(config, (kind == "sliding_attention" for kind in types))

    return rule


def every(default: int) -> Rule:
    """Every so many-th layer sees all tokens (`sliding_window_pattern`)."""

    def rule(config: Config) -> CacheLayout:
        pattern = config.count("sliding_window_pattern", default=default)
        return _sliding(config, ((i + 1) % pattern != 0 for i in range(config.layers)))

    return rule


def lettered(config: Config) -> CacheLayout:
    pattern = config.get("sliding_window_pattern")
    letters = [pattern[i % len(pattern)] if pattern else "G" for i in range(config.layers)]
    return _sliding(config, (letter == "L" for letter in letters))


def gemma3(config: Config) -> CacheLayout:
    wrapped = config.architecture == "gemma3"
    stated = {"num_attention_heads": 8, "num_key_value_heads": 4} if wrapped else {}
    text = {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "sliding_window": 512,
    }
    return every(6)(Config({"model_type": "gemma3_text", **text, **stated, **config.data}, config.where))


def gemma3n(config: Config) -> CacheLayout:
    types = config.layer_types()[: config.layers - config.count("num_kv_shared_layers", default=0)]
    return _sliding(config, (kind == "sliding_attention" for kind in types))


def gemma4(config: Config) -> CacheLayout:
    pattern = config.count("sliding_window_pattern", default=5)
    types = config.layer_types("full_attention" if (i + 1) % pattern == 0 else "" for i in range(config.layers))
    own = config.layers - config.count("num_kv_shared_layers", default=20)
    wide = config.count("global_head_dim", default=512) or config.head_dim
    shared = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
    full = attention(int(shared) if shared else config.kv_heads, wide)
    local = window(config.count("sliding_window", default=512), config.kv_heads, config.count("head_dim", default=256))
    return total(full if kind == "full_attention" else local for kind in types[:own])


def mimo_v2(config: Config) -> CacheLayout:
    full = attention(config.kv_heads, config.head_dim, config.count("v_head_dim"))
    heads = config.count("swa_num_key_value_heads")
    key, value = config.count("swa_head_dim"), config.count("swa_v_head_dim")
    local = window(config.count("sliding_window_size"), heads, key, value)
    return total(local if slides == 1 else full for slides in config.items("hybrid_layer_pattern"))


def step(config: Config) -> CacheLayout:
    types = config.layer_types("sliding_attention" if i % 2 == 0 else "" for i in range(config.layers))
    heads = config.count("num_attention_groups")
    other = config.get("attention_other_setting")
    few = int(other["num_attention_groups"]) if other else heads
    local = window(config.count("sliding_window", default=512), few, config.head_dim)
    return total(local if k == "sliding_attention" else attention(heads, config.head_dim) for k in types)


# ------------------------------------------------------------------ latent attention


def latent_layer(config: Config) -> CacheLayout:
    """One head: the compressed keys and values, and the part of the keys that carries positions."""
    return attention(1, config.count("kv_lora_rank", default=512), config.count("qk_rope_head_dim", default=64))


def latent(config: Config) -> CacheLayout:
    return latent_layer(config) * config.layers


def latent_twice(config: Config) -> CacheLayout:
    return latent_layer(config) * (2 * config.layers)


def indexed(config: Config) -> CacheLayout:
    """Beside the latent, the keys of an indexer, which upstream keeps twice."""
    return (latent_layer(config) + attention(1, config.count("index_head_dim", default=128))) * config.layers


def expanded(config: Config) -> CacheLayout:
    """Latent attention whose cache holds the expanded keys and values of every head."""
    key = config.count("qk_nope_head_dim", default=128) + config.count("qk_rope_head_dim", default=64)
    return attention(config.heads, key, config.count("v_head_dim", default=128)) * config.layers


def minicpm3(config: Config) -> CacheLayout:
    key = config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim")
    return attention(config.heads, key, config.hidden // config.heads) * config.layers
