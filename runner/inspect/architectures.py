"""What each architecture keeps for a row, from config.json: the rules of mlx-lm 0.32's model files.

Every rule is tested against the caches that mlx-lm makes (tests/inspect/test_architectures.py). An architecture
without a rule is taken for plain attention over all tokens, and its layout says that it is a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from runner.inspect.caches import NOTHING, CacheLayout, attention, state, window
from runner.inspect.config import Config

Rule = Callable[[Config], CacheLayout]


def cache_layout(config: Config) -> CacheLayout:
    """Raises BadFolder where config.json lacks what the rule needs."""
    rule = _RULES.get(config.architecture)
    try:
        layout = (rule or _plain)(config)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise config.wrong(f"does not fit a model of type {config.model_type!r}: {error}") from None
    return replace(layout, known=rule is not None)


def _sum(layers: Iterable[CacheLayout]) -> CacheLayout:
    return sum(layers, NOTHING)


# ------------------------------------------------------------------ attention


def _plain(config: Config) -> CacheLayout:
    """Every layer alike, attention over all tokens."""
    return attention(config.kv_heads, config.head_dim) * config.layers


def _all_heads(config: Config) -> CacheLayout:
    return attention(config.heads, config.hidden // config.heads) * config.layers


def _multi_query(config: Config) -> CacheLayout:
    heads = 1 if config.get("multi_query") is not False else config.heads
    return attention(heads, config.head_dim) * config.layers


def _per_layer_heads(config: Config) -> CacheLayout:
    return _sum(attention(int(heads), config.head_dim) for heads in config.items("num_kv_heads"))


def _shared_heads(config: Config) -> CacheLayout:
    return attention(config.heads // config.count("n_shared_head", default=8), config.head_dim) * config.layers


def _nested_heads(config: Config) -> CacheLayout:
    return attention(config.section("attn_config").count("kv_n_heads"), config.head_dim) * config.layers


def _reused(config: Config) -> CacheLayout:
    return attention(config.kv_heads, config.head_dim) * (config.layers - config.count("num_kv_reuse_layers"))


def _searched(config: Config) -> CacheLayout:
    """Blocks of a neural architecture search: some have no attention, others fewer heads."""
    blocks = [block["attention"] for block in config.items("block_configs")]
    used = [b for b in blocks if not b.get("no_op") and not b.get("replace_with_linear")]
    dim = config.hidden // config.heads
    return _sum(attention(config.heads // int(block["n_heads_in_group"]), dim) for block in used)


# ------------------------------------------------------------------ windows


def _sliding(config: Config, sliding: Iterable[bool]) -> CacheLayout:
    full = attention(config.kv_heads, config.head_dim)
    size = config.count("sliding_window", "window_size", "attention_window_size", default=0)
    return _sum(window(size, config.kv_heads, config.head_dim) if slides else full for slides in sliding)


def _by_type(default: Callable[[int], str] = lambda _: "full_attention") -> Rule:
    """`layer_types` says it, or where that is missing `default` does for each layer's number."""

    def rule(config: Config) -> CacheLayout:
        types = config.layer_types(map(default, range(config.layers)))
        return _sliding(config, (kind == "sliding_attention" for kind in types))

    return rule


def _every(default: int) -> Rule:
    """Every so many-th layer sees all tokens (`sliding_window_pattern`)."""

    def rule(config: Config) -> CacheLayout:
        pattern = config.count("sliding_window_pattern", default=default)
        return _sliding(config, ((i + 1) % pattern != 0 for i in range(config.layers)))

    return rule


def _lettered(config: Config) -> CacheLayout:
    pattern = config.get("sliding_window_pattern")
    letters = [pattern[i % len(pattern)] if pattern else "G" for i in range(config.layers)]
    return _sliding(config, (letter == "L" for letter in letters))


def _gemma3(config: Config) -> CacheLayout:
    wrapped = config.architecture == "gemma3"
    stated = {"num_attention_heads": 8, "num_key_value_heads": 4} if wrapped else {}
    text = {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "sliding_window": 512,
    }
    return _every(6)(Config({"model_type": "gemma3_text", **text, **stated, **config.data}, config.where))


def _gemma3n(config: Config) -> CacheLayout:
    types = config.layer_types()[: config.layers - config.count("num_kv_shared_layers", default=0)]
    return _sliding(config, (kind == "sliding_attention" for kind in types))


def _gemma4(config: Config) -> CacheLayout:
    pattern = config.count("sliding_window_pattern", default=5)
    types = config.layer_types("full_attention" if (i + 1) % pattern == 0 else "" for i in range(config.layers))
    own = config.layers - config.count("num_kv_shared_layers", default=20)
    wide = config.count("global_head_dim", default=512) or config.head_dim
    shared = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
    full = attention(int(shared) if shared else config.kv_heads, wide)
    local = window(config.count("sliding_window", default=512), config.kv_heads, config.count("head_dim", default=256))
    return _sum(full if kind == "full_attention" else local for kind in types[:own])


def _mimo_v2(config: Config) -> CacheLayout:
    full = attention(config.kv_heads, config.head_dim, config.count("v_head_dim"))
    heads = config.count("swa_num_key_value_heads")
    key, value = config.count("swa_head_dim"), config.count("swa_v_head_dim")
    local = window(config.count("sliding_window_size"), heads, key, value)
    return _sum(local if slides == 1 else full for slides in config.items("hybrid_layer_pattern"))


def _step(config: Config) -> CacheLayout:
    types = config.layer_types("sliding_attention" if i % 2 == 0 else "" for i in range(config.layers))
    heads = config.count("num_attention_groups")
    other = config.get("attention_other_setting")
    few = int(other["num_attention_groups"]) if other else heads
    local = window(config.count("sliding_window", default=512), few, config.head_dim)
    return _sum(local if k == "sliding_attention" else attention(heads, config.head_dim) for k in types)


# ------------------------------------------------------------------ latent attention


def _latent_layer(config: Config) -> CacheLayout:
    """One head: the compressed keys and values, and the part of the keys that carries positions."""
    return attention(1, config.count("kv_lora_rank", default=512), config.count("qk_rope_head_dim", default=64))


def _latent(config: Config) -> CacheLayout:
    return _latent_layer(config) * config.layers


def _latent_twice(config: Config) -> CacheLayout:
    return _latent_layer(config) * (2 * config.layers)


def _indexed(config: Config) -> CacheLayout:
    """Beside the latent, the keys of an indexer, which upstream keeps twice."""
    return (_latent_layer(config) + attention(1, config.count("index_head_dim", default=128))) * config.layers


def _expanded(config: Config) -> CacheLayout:
    """Latent attention whose cache holds the expanded keys and values of every head."""
    key = config.count("qk_nope_head_dim", default=128) + config.count("qk_rope_head_dim", default=64)
    return attention(config.heads, key, config.count("v_head_dim", default=128)) * config.layers


def _minicpm3(config: Config) -> CacheLayout:
    key = config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim")
    return attention(config.heads, key, config.hidden // config.heads) * config.layers


# ------------------------------------------------------------------ states


def _mamba_layer(config: Config, inner: int, kernel: int, values: int) -> CacheLayout:
    return state((kernel - 1) * inner + inner * values)


def _mamba(config: Config) -> CacheLayout:
    inner = config.count("intermediate_size", "d_inner")
    kernel, values = config.count("conv_kernel", "d_conv"), config.count("state_size", "d_state")
    return _mamba_layer(config, inner, kernel, values) * config.layers


def _mamba2_layer(heads: int, dim: int, kernel: int, groups: int, values: int) -> CacheLayout:
    return state((kernel - 1) * (heads * dim + 2 * groups * values), float32=heads * dim * values)


def _mamba2(config: Config) -> CacheLayout:
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


def _falcon_h1(config: Config) -> CacheLayout:
    return (_prefixed_mamba2(config) + attention(config.kv_heads, config.head_dim)) * config.layers


def _granite_hybrid(config: Config) -> CacheLayout:
    types = config.layer_types()
    dim = config.hidden // config.heads
    recurrent = types.count("mamba")
    mamba = _prefixed_mamba2(config) * recurrent if recurrent else NOTHING
    return mamba + attention(config.kv_heads, dim) * types.count("attention")


def _nemotron_h(config: Config) -> CacheLayout:
    pattern = config.get("hybrid_override_pattern")
    letters = {"mamba": "M", "attention": "*", "conv": "M"}
    blocks = list(pattern) if pattern else [letters.get(kind, "-") for kind in config.layer_types()]
    dim = config.count("head_dim", "attention_head_dim", default=config.hidden // config.heads)
    return _prefixed_mamba2(config) * blocks.count("M") + attention(config.kv_heads, dim) * blocks.count("*")


def _jamba(config: Config) -> CacheLayout:
    period, offset = config.get("attn_layer_period"), config.get("attn_layer_offset")
    guessed = ("attention" if i % int(period) == int(offset) else "mamba" for i in range(config.layers))
    types = config.layer_types(guessed)
    inner = config.count("mamba_expand") * config.hidden
    layer = _mamba_layer(config, inner, config.count("mamba_d_conv"), config.count("mamba_d_state"))
    full = attention(config.kv_heads, config.head_dim)
    return layer * types.count("mamba") + full * types.count("attention")


def _plamo2(config: Config) -> CacheLayout:
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


def _qwen_next(config: Config) -> CacheLayout:
    full = config.layers // config.count("full_attention_interval", default=4)
    return _delta_layer(config) * (config.layers - full) + attention(config.kv_heads, config.head_dim) * full


def _olmo_hybrid(config: Config) -> CacheLayout:
    types = config.layer_types("full_attention" if i % 4 == 3 else "linear_attention" for i in range(config.layers))
    linear = types.count("linear_attention")
    return _delta_layer(config) * linear + attention(config.kv_heads, config.head_dim) * (len(types) - linear)


def _kimi_linear(config: Config) -> CacheLayout:
    linear = config.section("linear_attn_config")
    heads, dim = linear.count("num_heads"), linear.count("head_dim")
    kernel = linear.count("short_conv_kernel_size", default=4)
    layer = state(3 * (kernel - 1) * heads * dim, float32=heads * dim * dim)
    recurrent = len(linear.items("kda_layers"))
    return layer * recurrent + _latent_layer(config) * (config.layers - recurrent)


def _global_layers(config: Config, group: int) -> int:
    return config.layers // group + config.layers % group


def _bailing_linear(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size"))
    dim = config.head_dim
    layer = state(config.heads * dim * dim)
    return layer * (config.layers - full) + attention(config.kv_heads, dim) * full


def _bailing_hybrid(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size"))
    dim = config.head_dim
    return state(float32=config.heads * dim * dim) * (config.layers - full) + _latent_layer(config) * full


def _bailing_v3(config: Config) -> CacheLayout:
    full = _global_layers(config, config.count("layer_group_size", default=4))
    heads, dim = config.count("num_attention_heads", default=16), config.count("head_dim", default=128)
    kernel = config.count("short_conv_kernel_size", default=4)
    layer = state(3 * (kernel - 1) * heads * dim, float32=heads * dim * dim)
    return layer * (config.layers - full) + _latent_layer(config) * full


def _lfm2(config: Config) -> CacheLayout:
    indices = config.get("full_attn_idxs")
    full = len(indices) if indices is not None else config.layer_types().count("full_attention")
    convolution = state((config.count("conv_L_cache") - 1) * config.hidden)
    return convolution * (config.layers - full) + attention(config.kv_heads, config.head_dim) * full


def _recurrent_gemma(config: Config) -> CacheLayout:
    kinds = config.items("block_types", "_block_types")
    width = config.count("lru_width", default=config.hidden)
    recurrent = state(config.count("conv1d_width") * width)
    local = window(config.count("attention_window_size"), config.kv_heads, config.head_dim)
    blocks = (kinds[i % len(kinds)] for i in range(config.layers))
    return _sum(recurrent if kind == "recurrent" else local for kind in blocks)


def _rwkv7(config: Config) -> CacheLayout:
    return state(2 * config.hidden + config.hidden * config.count("head_dim")) * config.layers


def _wrapper(config: Config) -> CacheLayout:
    """A model around a text model of another type."""
    text = Config({**config.data, "model_type": config.data.get("model_type", "llama")}, config.where)
    return _RULES.get(text.architecture, _plain)(text)


_PLAIN: Final = """
    Klear apertus bailing_moe cohere deepseek dots1 ernie4_5 ernie4_5_moe exaone gemma gemma2 glm glm4 glm4_moe
    granite granitemoe helium hunyuan hunyuan_v1_dense internlm2 internlm3 lille-130m mimo minicpm minimax mixtral
    nanochat nemotron olmo olmo2 olmoe phi phi3 phi3small phimoe phixtral qwen qwen2 qwen2_moe qwen2_vl qwen3
    qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 solar_open stablelm starcoder2 telechat3
"""

_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(_PLAIN.split(), _plain),
    "afm7": _reused,
    "afmoe": _by_type(),
    "bailing_hybrid": _bailing_hybrid,
    "bailing_moe_linear": _bailing_linear,
    "bailing_moe_v3": _bailing_v3,
    "cohere2": _every(4),
    "dbrx": _nested_heads,
    "deepseek_v2": _expanded,
    "deepseek_v3": _latent,
    "deepseek_v32": _indexed,
    "exaone4": _lettered,
    "exaone_moe": _by_type(),
    "falcon_h1": _falcon_h1,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4_text": _gemma4,
    "glm4_moe_lite": _latent,
    "glm_moe_dsa": _indexed,
    "gpt2": _all_heads,
    "gpt_bigcode": _multi_query,
    "gpt_neox": _all_heads,
    "gpt_oss": _by_type(lambda i: "sliding_attention" if i % 2 == 0 else "full_attention"),
    "gptj": _all_heads,
    "granitemoehybrid": _granite_hybrid,
    "jamba": _jamba,
    "kimi_k25": _latent,
    "kimi_vl": _latent,
    "kimi_linear": _kimi_linear,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2,
    "llama": _by_type(),
    "longcat_flash": _latent_twice,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "mellum": _by_type(),
    "mimo_v2_flash": _mimo_v2,
    "minicpm3": _minicpm3,
    "ministral3": _by_type(),
    "mistral3": _wrapper,
    "mistral4": _latent,
    "nemotron-nas": _searched,
    "nemotron_h": _nemotron_h,
    "olmo3": _by_type(lambda i: "full_attention" if (i + 1) % 4 == 0 else "sliding_attention"),
    "olmo_hybrid": _olmo_hybrid,
    "openelm": _per_layer_heads,
    "plamo": _shared_heads,
    "plamo2": _plamo2,
    "plamo3": _every(8),
    "qwen3_5": _qwen_next,
    "qwen3_5_moe": _qwen_next,
    "qwen3_next": _qwen_next,
    "recurrent_gemma": _recurrent_gemma,
    "rwkv7": _rwkv7,
    "step3p5": _step,
    "youtu_llm": _expanded,
}
