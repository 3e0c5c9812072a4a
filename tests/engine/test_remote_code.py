"""Models that bring Python code: run where the entry says so, refused with the way out where it does not."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.conversion import convert
from runner.engine.loader import load
from runner.engine.speculative.loading import load_draft
from runner.errors import EngineLoadError
from runner.protocol import LoadFailed
from tests.engine.client import engine_child
from tests.engine.drive import Driver
from tests.engine.test_conversion import settings
from tests.engine.tiny import bring_code, build_model, encode

FIX = "write trust_remote_code: true beside the source in the manifest"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_an_architecture_of_its_own_is_run_by_consent_alone(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "chat")
    plain = load(folder)
    bring_code(folder, tokenizer=False)
    with pytest.raises(EngineLoadError) as caught:
        load(folder)
    assert caught.value.message == "chat brings its architecture as Python code (own_model.py)"
    assert FIX in str(caught.value.hint)
    own = load(folder, trust_remote_code=True)
    assert type(own.model).__module__ == "custom_model"
    assert own.notes[0] == "weights loaded by mlx_lm: config.json sets model_file"
    prompt = mx.array([encode("the quick brown fox")])
    assert mx.allclose(own.model(prompt), -plain.model(prompt), atol=1e-4)
    driven = Driver(own)
    assert driven.one(prompt="hello", max_tokens=8).text != Driver(plain).one(prompt="hello", max_tokens=8).text


def test_a_tokenizer_of_its_own_is_run_by_consent_alone(tmp_path: Path) -> None:
    folder = bring_code(build_model(tmp_path / "chat"), model=False)
    with pytest.raises(EngineLoadError) as caught:
        load(folder)
    assert caught.value.message == "chat brings its tokenizer as Python code"
    assert FIX in str(caught.value.hint)
    own = load(folder, trust_remote_code=True)
    assert own.tokenizer.encode_rendered("hello") == encode("HELLO")


def test_one_that_transformers_has_itself_needs_no_consent(tmp_path: Path) -> None:
    folder = bring_code(build_model(tmp_path / "chat", "qwen3"), model=False)
    assert load(folder).tokenizer.encode_rendered("hello") == encode("hello")


def test_a_draft_needs_its_own(tmp_path: Path) -> None:
    target = load(bring_code(build_model(tmp_path / "chat"), tokenizer=False), trust_remote_code=True)
    draft = bring_code(build_model(tmp_path / "small", seed=1), tokenizer=False)
    with pytest.raises(EngineLoadError, match=r"draft .*small: small brings its architecture as Python code"):
        load_draft(draft, target, 0)
    assert type(load_draft(draft, target, 0, trust_remote_code=True).model).__module__ == "custom_model"


def test_its_quantised_copy_brings_the_code_along(tmp_path: Path) -> None:
    source = bring_code(build_model(tmp_path / "chat"), tokenizer=False)
    with pytest.raises(EngineLoadError, match="brings its architecture as Python code"):
        convert(source, tmp_path / "refused", settings(), lambda done, of: None)
    convert(source, tmp_path / "packed", settings(trust_remote_code=True), lambda done, of: None)
    with pytest.raises(EngineLoadError, match="packed brings its architecture"):
        load(tmp_path / "packed")
    own = load(tmp_path / "packed", trust_remote_code=True)
    assert type(own.model).__module__ == "custom_model"


def test_an_engine_process_does_as_its_spec_says_and_asks_the_hub_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = bring_code(build_model(tmp_path / "chat"))
    with (folder / "own_tokenizer.py").open("a") as file:
        file.write('from huggingface_hub import constants\n\nassert constants.HF_HUB_OFFLINE, "it may ask"\n')
    with engine_child(tmp_path / "untrusted", folder) as child:
        assert "own_model.py" in child.connect().wait(LoadFailed).reason
    with engine_child(tmp_path / "trusted", folder, trust_remote_code=True) as child:
        child.ready()
