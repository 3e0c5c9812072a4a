"""What models keep for a row that have layers with a state of one size, however long the row gets."""

from __future__ import annotations

from runner.inspect.attention_rules import latent_layer, total
from runner.inspect.caches import NOTHING, CacheLayout, attention, state, window
from runner.inspect.config import Config


def _mamba_layer(config: Config, inner: int, kernel: int, values: int) -> CacheLayout:
    return state((kernel - 1) * inner + inner * values)


def mamba(config: Config) -> CacheLayout:
    inner = config.count("intermediate_size", "d_inner")
    kernel, values = config.count("conv_kernel", "d_conv"), config.count("state_size", "d_state")
    return _mamba_layer(config, inner, kernel, values) * config.layers


def _mamba2_layer(heads: int, dim: int, kernel: int, groups: int, values: int) -> CacheLayout:
    return state((kernel - 1) * (heads * dim + 2 * groups * values), float32=heads * dim * values)


def mamba2(config: Config) -> CacheLayout:
    values = config.count("ssm_state_size", "state_size")
    kernel, groups = config.count("conv_kernel"), config.count("n_groups")
    return _mamba2_layer(config.heads, config.count("head_dim"), kernel, groups, values) * config.layers


def _prefixed_mamba2(config: Config) -> CacheLayout:
    """One layer, by the names that models with attention beside it use."""
    return _mamba2_layer(
        config.count("mamba_n_heads", "mamba_num_heads"),
        config.count("mamba_d_head", "mamba_head_dim"),
        config.count("mamba_d_conv", "conv_kernel", default=4),
        config.count("mamba_n_groups", "n_groups", default=1),
        config.count("mamba_d_state", "ssm_state_size"),
    )


def falcon_h1(config: Config) -> CacheLayout:
    return (_prefixed_mamba2(config) + attention(config.kv_heads, config.head_dim)) * config.layers


def granite_hybrid(config: Config) -> CacheLayout:
    types = config.layer_types()
    dim = config.hidden // config.heads
    recurrent = types.count("mamba")
    mamba = _prefixed_mamba2(config) * recurrent if recurrent else NOTHING
    return mamba + attention(config.kv_heads, dim) * types.count("attention")


def nemotron_h(config: Config) -> CacheLayout:
    pattern = config.get("hybrid_override_pattern")
    letters = {"mamba": "M", "attention": "*", "conv": "M"}
    blocks = list(pattern) if pattern else [letters.get(kind, "-") for kind in config.layer_types()]
    dim = config.count("head_dim", "attention_head_dim", default=config.hidden // config.heads)
    return _prefixed_mamba2(config) * blocks.count("M") + attention(config.kv_heads, dim) * blocks.count("*")


def jamba(config: Config) -> CacheLayout:
    period, offset = config.get("attn_layer_period"), config.get("attn_layer_offset")
    guessed = ("attention" if i % int(period) == int(offset) else "mamba" for i in range(config.layers))
    types = config.layer_types(guessed)
    inner = config.count("mamba_expand") * config.hidden
    layer = _mamba_layer(config, inner, config.count("mamba_d_conv"), config.count("mamba_d_state"))
    full = attention(config.kv_heads, config.head_dim)
    return layer * types.count("mamba") + full * types.count("attention")


def plamo2(config: Config) -> CacheLayout:
    step, layers = config.count("mamba_step", default=2), config.layers
    if config.get("mamba_enabled") is False:
        recurrent = 0
    elif layers <= step // 2:
        recurrent = layers - 1
    else:
        recurrent = sum(i % step != step // 2 for i in range(layers))
    heads, dim = config.count("mamba_num_heads", default=64), config.count("hidden_size_per_head", default=128)
    kernel, values = config.count("mamba_d_conv", default=4), config.count("mamba_d_state", default=64)
    mamba = state((kernel - 1) * heads * dim, float32=heads * dim * values)
    return mamba * recurrent + attention(config.kv_heads, dim) * (layers - recurrent)


def _delta_layer(config: Config) -> CacheLayout:
    """A gated delta net: a convolution's last inputs, and a matrix for each head of values in float32."""
    keys, values = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    key, value = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    kernel = config.count("linear_conv_kernel_dim", default=4)
    return state((kernel - 1) * (2 * keys * key + values * value), float32=values * key * value)


def qwen_next(config: Config) -> CacheLayout:
    full = config.layers // config.count("full_attention_interval", default=4)
    return _delta_layer(config) * (config.layers - full) + attention(config.kv_heads, config.head_dim) * full


def olmo_hybrid(config: Config) -> CacheLayout:
    types = config.layer_types("full_attention" if i % 4 == 3 else "linear_attention" for i in range(config.layers))
    linear = types.count("linear_attention")
    return _delta_layer(config) * linear + attention(config.kv_heads, config.head_dim) * (len(types) - linear)


def kimi_linear(config: Config) -> CacheLayout:
    linear = config.section("linear_attn_config")
    heads, dim = linear.count("num_heads"), linear.count("head_dim")
    kernel = linear.count("short_conv_kernel_size", default=4)
    layer = state(3 * (kernel - 1) * heads * dim, float32=heads * dim * dim)
    recurrent = len(linear.items("kda_layers"))
    return layer * recurrent + latent_layer(config) * (config.layers - recurrent)


def _global_layers(config: Config, group: int) -> int:
    return config.layers // group + config.layers % group


def bailing_linear(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size"))
    dim = config.head_dim
    layer = state(config.heads * dim * dim)
    return layer * (config.layers - full) + attention(config.kv_heads, dim) * full


def bailing_hybrid(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size"))
    dim = config.head_dim
    return state(float32=config.heads * dim * dim) * (config.layers - full) + latent_layer(config) * full


def bailing_v3(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size", default=4))
    heads, dim = config.count("num_attention_heads", default=16), config.count("head_dim", default=128)
    kernel = config.count("short_conv_kernel_size", default=4)
    layer = state(3 * (kernel - 1) * heads * dim, float32=heads * dim * dim)
    return layer * (config.layers - full) + latent_layer(config) * full


def lfm2(config: Config) -> CacheLayout:
    indices = config.get("full_attn_idxs")
    full = len(indices) if indices is not None else config.layer_types().count("full_attention")
    convolution = state((config.count("conv_L_cache") - 1) * config.hidden)
    return convolution * (config.layers - full) + attention(config.kv_heads, config.head_dim) * full


def recurrent_gemma(config: Config) -> CacheLayout:
    kinds = config.items("block_types", "_block_types")
    width = config.count("lru_width", default=config.hidden)
    recurrent = state(config.count("conv1d_width") * width)
    local = window(config.count("attention_window_size"), config.kv_heads, config.head_dim)
    blocks = (kinds[i % len(kinds)] for i in range(config.layers))
    return total(recurrent if kind == "recurrent" else local for kind in blocks)


def rwkv7(config: Config) -> CacheLayout:
    return state(2 * config.hidden + config.hidden * config.count("head_dim")) * config.layers
