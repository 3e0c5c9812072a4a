"""Models of random weights as the engine loads them, drawn on the device: of files there is only a tokenizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from msgspec.structs import replace

from runner.engine import kernel_cache, layouts
from runner.engine.chat import ChatTemplate, jinja_render
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel, activation_dtype, arrange, equip
from runner.engine.narrow import narrow_tokenizer
from runner.engine.tokenizer import Tokenizer
from tests.bench.geometry import GEOMETRIES, draw_model
from tests.bench.llama_1b import TEMPLATE, build_tokenizer

ENDLESS: Final[frozenset[int]] = frozenset()
"""No token ends an answer: what a model of random weights says is as long as was asked for."""


def draw(scratch: Path, geometry: str, seed: int = 0, quantisation: Quantisation | None = None) -> LoadedModel:
    """A model of that geometry. Its tokenizer is made in `scratch`."""
    kernel_cache.settle()
    return loaded(draw_model(GEOMETRIES[geometry], seed), tokenizer(scratch, geometry), geometry, quantisation)


def tokenizer(scratch: Path, geometry: str) -> Tokenizer:
    """One with as many tokens as the model, none of which ends an answer."""
    settings = GEOMETRIES[geometry]
    build_tokenizer(scratch, settings["vocab_size"])
    made, _ = narrow_tokenizer(scratch, settings, ENDLESS)
    return replace(made, eos_ids=ENDLESS)


def layout_of(model: Any, quantisation: Quantisation | None = None) -> Layout:
    """How the engine's loader would have it cached."""
    layout, vocabulary, _ = layouts.choose(model)
    return layout if quantisation is None else layouts.quantised(model, quantisation, layout, vocabulary)


def loaded(model: Any, words: Tokenizer, geometry: str, quantisation: Quantisation | None = None) -> LoadedModel:
    """What the engine's loader makes of such a model, once its files are read."""
    settings = GEOMETRIES[geometry]
    arrange(model)
    mx.eval(model.parameters())
    layout, _, _ = equip(model, 0, quantisation)
    return LoadedModel(
        model=model,
        tokenizer=words,
        chat=ChatTemplate(jinja_render(TEMPLATE, words.special_tokens)),
        architecture="LlamaForCausalLM",
        vocabulary=settings["vocab_size"],
        max_context=settings["max_position_embeddings"],
        dtype=activation_dtype(model),
        weights_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        layout=layout,
    )
