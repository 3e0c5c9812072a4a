"""A folder with a manifest in it, and a hub cache beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import dedent

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.load import load_manifest
from runner.plan.digests import DigestCache
from runner.plan.resolve import NotDownloaded, resolve
from runner.plan.spec import Desired
from tests.inspect.folders import queries, write_llama, write_lora, write_peft, write_tokenizer

from .folders import GIB, later, write


class Place:
    """A folder with a manifest in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = DigestCache(now=later)
        self.env = {"KEY": "sk-secret"}

    def resolve(self, text: str, *, machine_memory: int = 16 * GIB) -> Desired:
        """On a machine with a GPU, so that no weights are cast."""
        path = write(self.folder / "dev.yaml", dedent(text))
        return resolve(load_manifest(path, self.env), machine_memory=machine_memory, cache=self.cache, float32=False)

    def wrong(self, text: str, *, machine_memory: int = 16 * GIB) -> list[Diagnostic]:
        with pytest.raises(ManifestError) as caught:
            self.resolve(text, machine_memory=machine_memory)
        assert not isinstance(caught.value, NotDownloaded)
        return caught.value.diagnostics


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "configs").mkdir()
    return Place(tmp_path / "configs")


LARGE = {
    "num_hidden_layers": 11,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 128,
}
"""5 GiB."""


@pytest.fixture
def folders(place: Place) -> Place:
    """The folders that `codes.toml` speaks of."""
    here = place.folder
    write_llama(here / "chat", num_hidden_layers=4)
    write_llama(here / "small", num_hidden_layers=1)
    write_llama(here / "stranger", num_hidden_layers=1, tokens=[f"other{i}" for i in range(100)])
    write_llama(here / "packed", quantization={"bits": 4, "group_size": 64})
    write_llama(here / "states", model_type="mamba", state_size=8, conv_kernel=4)
    write_llama(here / "gemma2", model_type="gemma2")
    write_llama(here / "new", model_type="nanbeige", tool=None)
    write_llama(here / "unheard-of", model_type="unheard_of")
    write_llama(here / "original", model_type="glm4", tool="pt")
    write_lora(here / "pirate", queries(range(4)))
    write_lora(here / "wide", queries(range(4), 512, 512))
    write_lora(here / "weights", queries(range(4)), fine_tune_type="full")
    write_llama(here / "large", **LARGE)
    write_llama(here / "cousin", num_hidden_layers=1)
    write_tokenizer(here / "cousin", eos="<|bos|>")
    write_lora(here / "unscaled", queries(range(4)), parameters={"scale": None})
    write_llama(here / "odd", hidden_size=96, intermediate_size=160)
    write_llama(here / "broken")
    write(here / "broken" / "config.json", '{"model_type": "llama",')
    write_llama(here / "bare")
    write(here / "bare" / "config.json", '{"model_type": "llama"}')
    write_peft(here / "swapped", queries(range(4)))
    write_llama(here / "deepseek", model_type="deepseek_v3", kv_lora_rank=64, qk_rope_head_dim=64)
    write_llama(here / "phi", head_dim=80, num_attention_heads=2, num_key_value_heads=2)
    write_llama(here / "own-code", model_file="modeling.py")
    write(here / "own-code" / "modeling.py", "raise RuntimeError('nobody runs this to look at it')")
    write_llama(here / "lost-code", model_file="modeling.py")
    for name, reference in (("own-tokens", "tokens.Own"), ("their-tokens", "org/code--tokens.Theirs")):
        write_llama(here / name)
        settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [reference, None]}}
        write(here / name / "tokenizer_config.json", json.dumps(settings))
    write_llama(here / "damaged")
    os.truncate(here / "damaged" / "model.safetensors", 500)
    return place
