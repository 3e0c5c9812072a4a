"""The full loader: upstream's own, with transformers. Correct for every model, and slow to start."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils
from transformers import PreTrainedTokenizerBase

from runner.engine.chat import Messages, Render, jinja_render
from runner.engine.narrow import NAMED_TOKENS
from runner.engine.tokenizer import Tokenizer


def full_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, not yet evaluated, and its configuration. `trust_remote_code`: the Python file that
    config.json names is run. Raises what upstream raises."""
    gc.enable()  # upstream may leave whole weights as garbage, where it repacks them
    model, config = mlx_lm_utils.load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    return model, config


def full_tokenizer(
    folder: Path, eos_ids: frozenset[int], *, trust_remote_code: bool = False
) -> tuple[Tokenizer, Render | None]:
    """The folder's tokenizer and its chat renderer. `trust_remote_code`: a class that the folder brings is run. Raises
    what transformers raises."""
    settings = {"trust_remote_code": trust_remote_code}
    wrapper = mlx_lm_utils.load_tokenizer(folder, settings, eos_token_ids=sorted(eos_ids) or None)
    inner = wrapper._tokenizer  # noqa: SLF001 - upstream's wrapper has no public name for it

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = inner.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(ids: list[int]) -> str:
        text: str = inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    named = {name: getattr(inner, name, None) for name in NAMED_TOKENS}
    tokenizer = Tokenizer(
        encode_ids=encode,
        decode_ids=decode,
        vocab_size=len(inner),
        eos_ids=frozenset(wrapper.eos_token_ids),
        special_tokens={name: str(token) for name, token in named.items() if token is not None},
        backend=getattr(inner, "backend_tokenizer", None),
    )
    return tokenizer, _renderer(wrapper, inner, tokenizer)


def _renderer(wrapper: Any, inner: Any, tokenizer: Tokenizer) -> Render | None:
    own = type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own or wrapper._chat_template is not None:  # noqa: SLF001 - a template that is a function, not jinja

        def render(messages: Messages, variables: dict[str, Any]) -> str:
            text: str = wrapper.apply_chat_template(messages, tokenize=False, **variables)
            return text

        return Render(render)
    template = inner.chat_template
    if template is None:
        return None
    if isinstance(template, str):
        return jinja_render(template, tokenizer.special_tokens)
    return _choose(template, tokenizer)


def _choose(templates: dict[str, str], tokenizer: Tokenizer) -> Render | None:
    """A model with several templates: `tool_use` when the request has tools, else `default`."""
    renderers = {name: jinja_render(source, tokenizer.special_tokens) for name, source in templates.items()}
    if "default" not in renderers:
        return None

    def render(messages: Messages, variables: dict[str, Any]) -> str:
        name = "tool_use" if variables.get("tools") and "tool_use" in renderers else "default"
        return renderers[name](messages, variables)

    return Render(render, "\n".join(templates.values()))
