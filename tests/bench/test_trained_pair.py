"""A model in a larger geometry says what the demo says."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.loader import load
from tests.bench.geometry import GEOMETRIES
from tests.bench.trained_pair import DEMO, expand

pytestmark = pytest.mark.mlx

LARGER = {"num_hidden_layers": 7, "hidden_size": 384, "intermediate_size": 768, "num_key_value_heads": 4}


@pytest.mark.parametrize("changed", [{}, LARGER], ids=["as wide", "wider"])
def test_it_says_what_the_demo_says(changed: dict[str, int], tmp_path: Path) -> None:
    demo, larger = load(DEMO), load(expand(tmp_path, {**GEOMETRIES["small"], **changed}))
    text = mx.array([demo.tokenizer.encode_prompt("Count from 10 to 40. 10, 11, 12, 13, 14, 15, 16")])
    expected = demo.layout.new().call(demo.model, text)
    found = larger.layout.new().call(larger.model, text)
    assert found.shape[-1] == GEOMETRIES["small"]["vocab_size"]
    said = found[..., : expected.shape[-1]]
    assert mx.abs(said - expected).max().item() < 1e-4 * mx.abs(expected).max().item()
    assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(expected, axis=-1))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == len(larger.model.layers) > len(demo.model.layers)
