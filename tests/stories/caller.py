"""A real llama, written by hand instead of trained, that calls a tool and says a word once a tool has answered.

What is real: tokenizer, template, attention over the whole context, sampling. What is not: its weights know four
tokens. The head of its first layer asks, from the token that begins an answer, whether the token that begins a tool's
result is anywhere before, and that decides between the two texts, which are one token each; after either comes the end.
The second layer adds nothing, but needs what the first makes of every token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

_FROM: Final = Path(__file__).parents[2] / "examples" / "models" / "demo-chat"
_TEMPLATE: Final = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}{{ eos_token }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_HIDDEN, _HEAD = 32, 16
_SLOWEST: Final = _HEAD // 2 - 1
"""The component of a head that the rotary embedding turns least: not at all, for the purpose."""

_ASSISTANT, _TOOL, _ENDS, _OTHER, _ANSWERED = range(5)
"""What components of the hidden state say: which token this is, and that a tool has answered."""


def build_caller(folder: Path, call: dict[str, Any], word: str, context: int = 131_072) -> Path:
    """A model folder. `call` is {"name", "arguments"}; `context` is in tokens."""
    folder.mkdir(parents=True)
    tokens = _write_tokenizer(folder, [f"<tool_call>{json.dumps(call)}</tool_call>", word])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "num_hidden_layers": 2,
        "intermediate_size": _HIDDEN,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": _HEAD,
        "vocab_size": tokens["size"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e12,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": tokens["<|bos|>"],
        "eos_token_id": tokens["<|end|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), _weights(tokens), {"format": "mlx"})
    return folder


def _write_tokenizer(folder: Path, texts: list[str]) -> dict[str, int]:
    """demo-chat's, with a token for each of two texts. Returns the tokens that the weights know, and how many there
    are."""
    tokenizer = json.loads((_FROM / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    like = next(token for token in tokenizer["added_tokens"] if not token["special"])
    for number, text in enumerate(texts, start=size):
        tokenizer["added_tokens"].append({**like, "id": number, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((_FROM / "tokenizer_config.json").read_text())
    settings |= {"chat_template": _TEMPLATE, "model_max_length": 1_000_000}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    known = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {**known, "call": size, "word": size + 1, "size": size + len(texts)}


def _weights(tokens: dict[str, int]) -> dict[str, mx.array]:
    embedding = _zeros(tokens["size"], _HIDDEN)
    embedding[:, _OTHER] = 1
    for token, component in (("<|assistant|>", _ASSISTANT), ("<|tool|>", _TOOL), ("call", _ENDS), ("word", _ENDS)):
        embedding[tokens[token]] = mx.eye(_HIDDEN)[component]
    query, key, value = (_zeros(_HEAD, _HIDDEN) for _ in range(3))
    output = _zeros(_HIDDEN, _HEAD)
    query[_SLOWEST, _ASSISTANT] = key[_SLOWEST, _TOOL] = 4
    value[0, _TOOL] = output[_ANSWERED, 0] = 4
    # Not quite nothing elsewhere: the engine compares logits when it loads a model.
    head = 0.01 * mx.random.normal((tokens["size"], _HIDDEN), key=mx.random.key(0))
    head[tokens["call"], _ASSISTANT] = head[tokens["word"], _ANSWERED] = head[tokens["<|end|>"], _ENDS] = 20
    return {
        "model.embed_tokens.weight": embedding,
        **_layer(0, query, key, value, output),
        **_layer(1, mx.zeros_like(query), mx.zeros_like(key), mx.zeros_like(value), mx.zeros_like(output)),
        "model.norm.weight": mx.ones(_HIDDEN),
        "lm_head.weight": head,
    }


def _layer(number: int, query: mx.array, key: mx.array, value: mx.array, output: mx.array) -> dict[str, mx.array]:
    own = {
        "input_layernorm": mx.ones(_HIDDEN),
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": output,
        "post_attention_layernorm": mx.ones(_HIDDEN),
        **{f"mlp.{name}_proj": _zeros(_HIDDEN, _HIDDEN) for name in ("gate", "up", "down")},
    }
    return {f"model.layers.{number}.{name}.weight": array for name, array in own.items()}


def _zeros(*shape: int) -> Any:
    return mx.zeros(shape)
