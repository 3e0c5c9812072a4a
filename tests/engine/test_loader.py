"""A folder to something that can be served, or the reason why it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from runner.engine.language import eos_ids
from runner.engine.loader import load
from runner.errors import EngineLoadError
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.tiny import build_model, build_tokenizer

ROOT = Path(__file__).parents[2]
on_cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="computes in float32 on the CPU only")


def edit(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_says_what_it_has_loaded(model_folder: ModelFolder) -> None:
    loaded = load(model_folder("llama"))
    assert loaded.architecture == "llamaForCausalLM"
    assert loaded.max_context == 512
    assert loaded.vocabulary == loaded.tokenizer.vocab_size
    assert loaded.notes == ()
    file = model_folder("llama") / "model.safetensors"
    assert 0 < file.stat().st_size - loaded.weights_bytes < 8192, "the rest of the file is its header"


@on_cpu
def test_computes_in_float32_on_the_cpu(tmp_path: Path) -> None:
    build_model(tmp_path, bits=4)
    weights = {
        name: array.astype(mx.bfloat16) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in dict(mx.load(str(tmp_path / "model.safetensors"))).items()
    }
    mx.eval(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    loaded = load(tmp_path)
    kinds = {array.dtype for _, array in tree_flatten(loaded.model.parameters())}
    assert kinds == {mx.float32, mx.uint32}
    assert loaded.dtype == mx.float32


def test_the_full_way_serves_what_the_narrow_one_may_not(model_folder: ModelFolder, tmp_path: Path) -> None:
    narrow = load(model_folder("llama"))
    folder = edit(build_model(tmp_path), rope_theta={"__float__": "Infinity"})
    edit(folder, rope_theta=10000, unused={"__float__": "Infinity"})
    build_tokenizer(folder, unk_token="<|pad|>", split_special_tokens=False, chat_template_type=None)
    (folder / "added_tokens.json").write_text("{}")
    full = load(folder)
    assert full.notes == (
        "weights loaded by mlx_lm: config.json has tagged numbers",
        "tokenizer loaded by transformers: added tokens are in added_tokens.json",
    )
    messages = [{"role": "user", "content": "hello"}]
    assert (
        Driver(full).one(messages=messages, max_tokens=12).text
        == Driver(narrow).one(messages=messages, max_tokens=12).text
    )


def test_end_tokens_come_from_all_three_files(tmp_path: Path) -> None:
    folder = build_model(tmp_path, config={"eos_token_id": 7})
    assert load(folder).tokenizer.eos_ids == {1, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load(folder).tokenizer.eos_ids == {1, 8, 9}, "generation_config.json replaces config.json's, as upstream"
    (folder / "generation_config.json").write_text("not json")
    assert load(folder).tokenizer.eos_ids == {1, 7}
    assert eos_ids({}) == frozenset()


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, 512),
        ({"max_position_embeddings": None}, 0),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 99}}, 99),
        ({"max_position_embeddings": None, "n_positions": 77}, 77),
    ],
)
def test_context(tmp_path: Path, config: dict[str, Any], context: int) -> None:
    assert load(build_model(tmp_path, config=config)).max_context == context


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineLoadError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 128}, "shape"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"model_type": "not_a_model"}, "not_a_model"),
        ({"model_type": None}, "cannot be loaded"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = edit(build_model(tmp_path / "broken"), **config)
    with pytest.raises(EngineLoadError, match=reason) as error:
        load(folder)
    assert error.value.message.startswith("broken cannot be loaded")


def test_caches_of_a_kind_that_is_not_known_serve_one_row_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama
    from mlx_lm.models.cache import ChunkedKVCache

    folder = build_model(tmp_path / "chunked")
    expected = Driver(load(folder)).one(prompt=[9, 8, 7, 6], max_tokens=9).text
    monkeypatch.setattr(llama.Model, "make_cache", lambda self: [ChunkedKVCache(64) for _ in self.layers])
    loaded = load(folder)
    assert loaded.layout.unknown == ["ChunkedKVCache"]
    assert not loaded.layout.trimmable
    assert not loaded.batches
    assert "one at a time" in loaded.notes[0]
    driver = Driver(loaded, prefix_cache_bytes=1 << 20, prefill_step_size=2)
    answers = driver.run([generate(i, prompt=[9, 8, 7, 6], max_tokens=9) for i in range(2)])
    assert [answers[i].text for i in range(2)] == [expected] * 2
    following = driver.one(prompt=[9, 8, 7, 5], max_tokens=9)
    assert following.usage is not None
    assert following.usage.cached_tokens == 3
    assert following.text == Driver(loaded).one(prompt=[9, 8, 7, 5], max_tokens=9).text


def test_the_narrow_way_imports_no_transformers_and_lowers_no_limits(model_folder: ModelFolder) -> None:
    script = (
        "import resource, sys\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "from pathlib import Path\n"
        "from runner.engine import upstream\n"
        "from runner.engine.loader import load\n"
        "load(Path(sys.argv[1]))\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == before\n"
        "print([name for name in ('transformers', 'mlx_lm.utils', 'numpy') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, str(model_folder("llama"))]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout == "[]\n"
