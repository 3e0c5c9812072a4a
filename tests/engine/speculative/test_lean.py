"""A draft in fewer operations says what upstream's model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.loader import LoadedModel, load
from runner.engine.speculative.lean import LeanLlama, lean
from runner.engine.speculative.loading import load_draft
from tests.engine.drive import active_memory
from tests.engine.operations import with_views
from tests.engine.tiny import build_model

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="of use on the CPU alone")

SHAPES: dict[str, dict[str, Any]] = {
    "shared heads": {},
    "a head each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "other rotation": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "neighbours in pairs": {"rope_traditional": True},
    "wide heads": {"head_dim": 32},
}


def build(folder: Path, **config: Any) -> Path:
    """A Llama whose norms have weights of all sizes."""
    path = build_model(folder, config=config)
    weights: Any = mx.load(str(path / "model.safetensors"))
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = mx.random.uniform(0.5, 2.0, value.shape, key=mx.random.key(len(name)))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def logits(loaded: LoadedModel) -> list[mx.array]:
    """Of a prompt of two rows of other lengths, what they go on with, and with a row of its own that has joined."""
    caches = loaded.layout.new(2)
    tokens = mx.array([[5, 9, 11, 40, 3], [7, 8, 21, 0, 0]], dtype=mx.uint32)
    made = [loaded.layout.new().call(loaded.model, tokens[:1, :1])]
    made += [caches.call(loaded.model, tokens, [5, 3])[i : i + 1, :length] for i, length in enumerate((5, 3))]
    made += [caches.call(loaded.model, tokens[:, :2]), caches.call(loaded.model, tokens[:, 2:3])]
    other = loaded.layout.new()
    made.append(other.call(loaded.model, mx.array([[*range(30, 80)]], dtype=mx.uint32)))
    caches.join(other)
    made.append(caches.call(loaded.model, mx.array([[1], [2], [3]], dtype=mx.uint32)))
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_it_says_the_same(shape: str, tmp_path: Path) -> None:
    folder = build(tmp_path, **SHAPES[shape])
    plain, made = load(folder), lean(load(folder), 0)
    assert isinstance(made.model, LeanLlama)
    for expected, found in zip(logits(plain), logits(made), strict=True):
        scale = mx.abs(expected).max().item()
        assert mx.abs(expected - found).max().item() < 1e-5 * scale


def test_it_has_fewer_operations(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    counts = []
    for loaded in (load(folder), lean(load(folder), 0)):
        caches = loaded.layout.new()
        for tokens in ([[1, 2, 3]], [[4]]):
            made = caches.call(loaded.model, mx.array(tokens, dtype=mx.uint32))
            counts.append(sum(with_views(tmp_path, made).values()))
            mx.eval(made, caches.arrays)
    wide, one, lean_wide, lean_one = counts
    assert lean_one < 0.68 * one
    assert lean_wide < 0.85 * wide


def test_nothing_is_left_of_what_it_was_made_of(tmp_path: Path) -> None:
    folder = build(tmp_path)
    before = active_memory()
    made = lean(load(folder), 0)
    assert active_memory() - before < 1.1 * made.weights_bytes


def test_its_weights_are_in_the_place_of_those_that_it_was_made_of(tmp_path: Path) -> None:
    untied, tied = (load(build(tmp_path / str(tie), tie_word_embeddings=tie)) for tie in (False, True))
    norms = 7 * 64 * 4
    assert lean(untied, 0).weights_bytes == untied.weights_bytes - norms
    vocabulary = untied.vocabulary * 64 * 4
    assert lean(tied, 0).weights_bytes == tied.weights_bytes - norms + vocabulary, "the head has the norm in it"


@pytest.mark.parametrize(
    ("kind", "options", "config"),
    [
        ("llama", {}, {"attention_bias": True}),
        ("llama", {"bits": 4}, {}),
        ("llama", {}, {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}),
        ("qwen3", {}, {}),
    ],
)
def test_what_is_not_known_to_be_the_same_stays(
    kind: str, options: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    layers = {"num_hidden_layers": len(config["layer_types"])} if "layer_types" in config else {}
    loaded = load(build_model(tmp_path, kind, config={**config, **layers}, **options))
    assert lean(loaded, 8) is loaded


def test_other_types_stay(tmp_path: Path) -> None:
    loaded = load(build_model(tmp_path), dtype="bfloat16")
    assert lean(loaded, 0) is loaded


def test_large_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(build_model(tmp_path))
    monkeypatch.setattr("runner.engine.speculative.lean.SMALL", loaded.weights_bytes - 1)
    assert lean(loaded, 0) is loaded


def test_a_draft_is_lean(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    draft = load_draft(folder, load(folder), 8)
    assert isinstance(draft.model, LeanLlama)
