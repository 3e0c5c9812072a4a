"""What a folder's code is, as transformers and mlx-lm find it; and which of it cannot be done without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.inspect.files import DigestCache
from runner.inspect.remote_code import RemoteCode, remote_code


@pytest.mark.parametrize(
    ("config", "tokenizer", "found", "needed"),
    [
        ({}, None, RemoteCode(), ()),
        ({}, {}, RemoteCode(), ()),
        ({"model_file": "own.py"}, None, RemoteCode("own.py"), ("own.py",)),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.M"}}, {}, RemoteCode(), ()),
        ({}, {"auto_map": {"AutoTokenizer": ["slow.S", None]}}, RemoteCode("", "slow.py", "", False), ("slow.py",)),
        ({}, {"auto_map": ["slow.S", "fast.F"]}, RemoteCode("", "fast.py", "", False), ("fast.py",)),
        (
            {"model_type": "qwen3"},
            {"auto_map": {"AutoTokenizer": ["s.S", None]}},
            RemoteCode("", "s.py", "", True),
            (),
        ),
        (
            {"model_type": "unheard_of"},
            {"auto_map": {"AutoTokenizer": ["s.S", None]}, "tokenizer_class": "Qwen2Tokenizer"},
            RemoteCode("", "s.py", "", True),
            (),
        ),
        ({}, {"auto_map": {"AutoTokenizer": ["org/code--s.S"]}}, RemoteCode("", "s.py", "org/code", False), ("s.py",)),
        ({}, {"auto_map": {"AutoConfig": "c.C"}}, RemoteCode(), ()),
        ({}, {"auto_map": 7}, RemoteCode(), ()),
    ],
)
def test_code_that_is_asked_for(
    config: dict[str, Any], tokenizer: dict[str, Any] | None, found: RemoteCode, needed: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    seen = remote_code(tmp_path, DigestCache())
    assert seen == found
    assert seen.needed == needed
    assert seen.files == tuple(name for name in (seen.model, seen.tokenizer) if name and not seen.elsewhere)


@pytest.mark.mlx
@pytest.mark.parametrize(("kind", "own"), [("llama", ""), ("qwen3", ""), ("unheard_of", "Qwen2Tokenizer"), ("", "S")])
def test_transformers_agrees_on_what_it_has_itself(kind: str, own: str, tmp_path: Path) -> None:
    """`resolve_trust_remote_code` is asked for consent exactly where there is no class of its own."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, tokenizer_class_from_name

    try:
        config = type(AutoConfig.for_model(kind))
    except ValueError:
        config = PreTrainedConfig
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = {"auto_map": {"AutoTokenizer": ["s.S", None]}, "tokenizer_class": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    has_own = config in TOKENIZER_MAPPING or (own and tokenizer_class_from_name(own) is not None)
    assert remote_code(tmp_path, DigestCache()).known == bool(has_own)
