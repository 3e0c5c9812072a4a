"""A tokenizer and chat template straight from a model folder's files, without transformers (1.2 s, 77 MB).

Taken only where transformers would do exactly the same with the folder: its generic class for `tokenizer.json`, which
loads that file as it is, and nothing in `tokenizer_config.json` that makes it change what it loaded. Everything else
raises NotNarrow with the reason, and goes through the full loader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from runner.engine.tokenizer import Tokenizer

NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_GENERIC_CLASSES: Final = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Families whose hub class transformers replaces by another, or whose regular expression it patches.
_OVERRIDDEN_TYPES: Final = (
    "mistral",
    "mixtral",
    "ministral",
    "pixtral",
    "voxtral",
    "phi3",
    "phimoe",
    "internlm",
    "jamba",
)
_OVERRIDDEN: Final = frozenset(
    {"qwen2", "minimax_m2", "nemotron", "iquestcoder", "minicpm3", "ernie4_5", "ernie4_5_moe"}
)
# Settings that make transformers treat text or tokens in its own way.
_SPECIAL_SETTINGS: Final = (
    "auto_map",
    "chat_template_type",
    "fast_tokenizer_files",
    "fix_mistral_regex",
    "split_special_tokens",
)


class NotNarrow(Exception):  # noqa: N818 - a condition, read as `except NotNarrow`
    """The folder needs the full loader; the message says why."""


def narrow_tokenizer(folder: Path, config: Mapping[str, Any], eos_ids: frozenset[int]) -> tuple[Tokenizer, str | None]:
    """The folder's tokenizer and its chat template's source, or None where it has no template.

    `eos_ids` are those that the model's configuration names. Raises NotNarrow.
    """
    settings = _settings(folder, config)
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - `weights.py` has no use for it, and comes first

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    special = {name: text for name in NAMED_TOKENS if (text := _content(settings.get(name))) is not None}
    _require_same_tokens(backend, settings, special)
    if (eos := special.get("eos_token")) is not None:
        eos_ids |= {cast("int", backend.token_to_id(eos))}

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # Without the offsets, which nobody asks for: 0.26 ms in place of 0.34 for 430 tokens. And `encode` keeps the
        # interpreter's lock, so that no other thread goes on.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    tokenizer = Tokenizer(
        encode_ids=encode,
        decode_ids=backend.decode,
        vocab_size=backend.get_vocab_size(),
        eos_ids=eos_ids,
        special_tokens=special,
        backend=backend,
    )
    return tokenizer, _chat_template(folder, settings)


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's tokenizer_config.json, if the narrow path may read it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise NotNarrow(f"{name} is missing")
    if (folder / "tekken.json").exists():
        raise NotNarrow("the tokenizer is Mistral's own")
    settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kind = settings.get("tokenizer_class")
    if kind not in _GENERIC_CLASSES:
        raise NotNarrow(f"tokenizer_class is {kind}, not one that takes tokenizer.json as it is")
    model_type = str(config.get("model_type", ""))
    if model_type in _OVERRIDDEN or model_type.startswith(_OVERRIDDEN_TYPES):
        raise NotNarrow(f"transformers overrides the tokenizer of {model_type} models")
    for key in _SPECIAL_SETTINGS:
        if settings.get(key):
            raise NotNarrow(f"tokenizer_config.json sets {key}")
    if "auto_map" in config:
        raise NotNarrow("config.json names remote code")
    if "added_tokens_decoder" not in settings:
        if (folder / "added_tokens.json").exists():
            raise NotNarrow("added tokens are in added_tokens.json")
        special = folder / "special_tokens_map.json"
        if special.is_file():
            settings |= json.loads(special.read_text(encoding="utf-8"))
    return settings


def _require_same_tokens(backend: Any, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Nothing in the settings may add a token to what tokenizer.json has, or change one."""
    from tokenizers import AddedToken  # noqa: PLC0415 - see above

    added: dict[int, Any] = backend.get_added_tokens_decoder()
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        if repr(added.get(int(index))) != repr(AddedToken(**token)):
            raise NotNarrow(f"token {index} differs between tokenizer_config.json and tokenizer.json")
    known = {token.content for token in added.values()}
    for text in (*special.values(), *_extra_tokens(settings)):
        if text not in known:
            raise NotNarrow(f"tokenizer_config.json names the token {text!r}, which tokenizer.json has not added")


def _extra_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """Every token that the settings name beside the seven: lists of extra ones, and `<anything>_token` keys."""
    for key, value in settings.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = value.values() if isinstance(value, dict) else value or ()
        elif key.endswith("_token") and key not in NAMED_TOKENS and not isinstance(value, bool):
            tokens = (value,)
        else:
            continue
        for token in tokens:
            if (text := _content(token)) is not None:
                yield text


def _content(token: object) -> str | None:
    """A token's text: written as such, or as an AddedToken object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / "additional_chat_templates").exists():
        raise NotNarrow("the model has several chat templates")
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise NotNarrow("the model has several chat templates")
    return template
