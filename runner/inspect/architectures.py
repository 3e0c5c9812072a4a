"""What each architecture keeps for a row, from config.json: the rules of mlx-lm 0.32's model files.

Every rule is tested against the caches that mlx-lm makes (tests/inspect/test_architectures.py). An architecture
without a rule is taken for plain attention over all tokens, and its layout says that it is a guess.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from runner.inspect import attention_rules, state_rules
from runner.inspect.attention_rules import Rule
from runner.inspect.caches import CacheLayout
from runner.inspect.config import Config


def cache_layout(config: Config) -> CacheLayout:
    """Raises BadFolder where config.json lacks what the rule needs."""
    rule = _RULES.get(config.architecture)
    try:
        layout = (rule or attention_rules.plain)(config)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise config.wrong(f"does not fit a model of type {config.model_type!r}: {error}") from None
    return replace(layout, known=rule is not None)


def _wrapper(config: Config) -> CacheLayout:
    """A model around a text model of another type."""
    text = Config({**config.data, "model_type": config.data.get("model_type", "llama")}, config.where)
    return _RULES.get(text.architecture, attention_rules.plain)(text)


_PLAIN: Final = """
    Klear apertus bailing_moe cohere deepseek dots1 ernie4_5 ernie4_5_moe exaone gemma gemma2 glm glm4 glm4_moe
    granite granitemoe helium hunyuan hunyuan_v1_dense internlm2 internlm3 lille-130m mimo minicpm minimax mixtral
    nanochat nemotron olmo olmo2 olmoe phi phi3 phi3small phimoe phixtral qwen qwen2 qwen2_moe qwen2_vl qwen3
    qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 solar_open stablelm starcoder2 telechat3
"""

_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(_PLAIN.split(), attention_rules.plain),
    "afm7": attention_rules.reused,
    "afmoe": attention_rules.by_type(),
    "bailing_hybrid": state_rules.bailing_hybrid,
    "bailing_moe_linear": state_rules.bailing_linear,
    "bailing_moe_v3": state_rules.bailing_v3,
    "cohere2": attention_rules.every(4),
    "dbrx": attention_rules.nested_heads,
    "deepseek_v2": attention_rules.expanded,
    "deepseek_v3": attention_rules.latent,
    "deepseek_v32": attention_rules.indexed,
    "exaone4": attention_rules.lettered,
    "exaone_moe": attention_rules.by_type(),
    "falcon_h1": state_rules.falcon_h1,
    "gemma3": attention_rules.gemma3,
    "gemma3_text": attention_rules.gemma3,
    "gemma3n": attention_rules.gemma3n,
    "gemma4": attention_rules.gemma4,
    "gemma4_text": attention_rules.gemma4,
    "glm4_moe_lite": attention_rules.latent,
    "glm_moe_dsa": attention_rules.indexed,
    "gpt2": attention_rules.all_heads,
    "gpt_bigcode": attention_rules.multi_query,
    "gpt_neox": attention_rules.all_heads,
    "gpt_oss": attention_rules.by_type(lambda i: "sliding_attention" if i % 2 == 0 else "full_attention"),
    "gptj": attention_rules.all_heads,
    "granitemoehybrid": state_rules.granite_hybrid,
    "jamba": state_rules.jamba,
    "kimi_k25": attention_rules.latent,
    "kimi_vl": attention_rules.latent,
    "kimi_linear": state_rules.kimi_linear,
    "lfm2": state_rules.lfm2,
    "lfm2_moe": state_rules.lfm2,
    "llama": attention_rules.by_type(),
    "longcat_flash": attention_rules.latent_twice,
    "mamba": state_rules.mamba,
    "mamba2": state_rules.mamba2,
    "mellum": attention_rules.by_type(),
    "mimo_v2_flash": attention_rules.mimo_v2,
    "minicpm3": attention_rules.minicpm3,
    "ministral3": attention_rules.by_type(),
    "mistral3": _wrapper,
    "mistral4": attention_rules.latent,
    "nemotron-nas": attention_rules.searched,
    "nemotron_h": state_rules.nemotron_h,
    "olmo3": attention_rules.by_type(lambda i: "full_attention" if (i + 1) % 4 == 0 else "sliding_attention"),
    "olmo_hybrid": state_rules.olmo_hybrid,
    "openelm": attention_rules.per_layer_heads,
    "plamo": attention_rules.shared_heads,
    "plamo2": state_rules.plamo2,
    "plamo3": attention_rules.every(8),
    "qwen3_5": state_rules.qwen_next,
    "qwen3_5_moe": state_rules.qwen_next,
    "qwen3_next": state_rules.qwen_next,
    "recurrent_gemma": state_rules.recurrent_gemma,
    "rwkv7": state_rules.rwkv7,
    "step3p5": attention_rules.step,
    "youtu_llm": attention_rules.expanded,
}
