"""The production example and its overlays, against folders with the geometry of the models they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ManifestError
from runner.machine import Machine
from runner.manifest.advice import advise
from runner.manifest.load import Loaded, load_manifest
from runner.plan.digests import DigestCache
from runner.plan.resolve import look
from tests.inspect.folders import llama_tensors, write_tensors, write_tokenizer
from tests.plan.folders import GIB, later, write

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEY = "a-key-of-this-test"


def _llama(depth: int, hidden: int, inner: int, heads: int, head_dim: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": depth,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "quantization": {"group_size": 64, "bits": 4},
    }


LARGE = "mlx-community/Llama-3.1-8B-Instruct-4bit"
SMALL = "mlx-community/Llama-3.2-3B-Instruct-4bit"
TINY = "mlx-community/Llama-3.2-1B-Instruct-4bit"
# By the config.json of each
MODELS = {
    LARGE: _llama(32, 4096, 14336, 32, 128, tied=False),
    SMALL: _llama(28, 3072, 8192, 24, 128, tied=True),
    TINY: _llama(16, 2048, 8192, 32, 64, tied=True),
}


def _hub(cache: Path, loaded: Loaded) -> None:
    """What the manifest names, downloaded: headers with holes behind them."""
    for model in loaded.manifest.models.values():
        assert model.revision is not None
        folder = cache / f"models--{model.source.replace('/', '--')}" / "snapshots" / model.revision
        config = MODELS[model.source]
        write(folder / "config.json", json.dumps(config))
        write_tokenizer(folder)
        tensors = {}
        for name, (_, shape) in llama_tensors(config).items():
            if len(shape) == 1:
                tensors[name] = ("BF16", shape)
                continue
            rows, columns = shape
            base = name.removesuffix(".weight")
            tensors[name] = ("U32", (rows, columns // 8))
            tensors[f"{base}.scales"] = tensors[f"{base}.biases"] = ("BF16", (rows, columns // 64))
        write_tensors(folder / "model.safetensors", tensors)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    (folder / "secrets").mkdir(exist_ok=True)
    (folder / "secrets" / "lan_key").write_text(f"{KEY}\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.parametrize(
    ("overlays", "memory", "models"),
    [
        (
            [],
            32,
            {"chat": LARGE, "quick": TINY},
        ),
        (["small"], 16, {"chat": SMALL}),
        (
            ["cuda"],
            80,
            {"chat": LARGE, "quick": TINY},
        ),
    ],
)
def test_fits_the_machine_it_is_for(
    overlays: list[str], memory: int, models: dict[str, str], configs: Path, tmp_path: Path
) -> None:
    files = [configs / "production.yaml", *(configs / f"production.{name}.yaml" for name in overlays)]
    loaded = load_manifest(files, {})
    assert advise(loaded) == []
    assert {name: model.source for name, model in loaded.manifest.models.items()} == models
    _hub(tmp_path / "hub", loaded)
    found = look(loaded, Machine(memory * GIB), DigestCache(now=later))
    assert [*found.wrong, *found.missing, *found.desired.warnings] == []
    lan, local = found.desired.listeners
    assert (lan.host, lan.port, lan.api_keys, lan.models) == ("0.0.0.0", 8000, (KEY,), ("chat",))
    assert (local.host, local.api_keys, set(local.models)) == ("127.0.0.1", (), set(models))


def test_what_is_not_downloaded_is_all_that_is_missing(configs: Path) -> None:
    loaded = load_manifest(configs / "production.yaml", {})
    found = look(loaded, Machine(32 * GIB), DigestCache())
    assert found.wrong == []
    assert {d.code for d in found.missing} == {"E604"}
    assert len(found.desired.downloads) == 2


def test_a_key_comes_from_its_file_or_from_the_environment(configs: Path) -> None:
    (configs / "secrets" / "lan_key").unlink()
    with pytest.raises(ManifestError) as caught:
        load_manifest(configs / "production.yaml", {})
    assert [d.code for d in caught.value.diagnostics] == ["E503"]
    auth = load_manifest(configs / "production.yaml", {"LAN_KEY": "other"}).manifest.servers["lan"].auth
    assert auth is not None
    assert [key.get_secret_value() for key in auth.api_keys or ()] == ["other"]
