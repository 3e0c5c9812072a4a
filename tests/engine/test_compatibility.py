"""Models are tried in a batch before they are trusted with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.compatibility import batches, fuses_prompts
from runner.engine.kv.caches import Caches
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.operations import with_views
from tests.engine.tiny import CONFIGS, encode

TEXT = encode("the quick brown fox, hello world. def main")


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_knows_which_architectures_batch(model_folder: ModelFolder, model_type: str, bits: int) -> None:
    loaded = load(model_folder(model_type, bits))
    # Upstream's gemma2 lays the rows' masks over its heads.
    assert loaded.batches == (model_type != "gemma2")
    assert bool(loaded.notes) != loaded.batches


def test_one_that_does_not_is_served_one_row_at_a_time(model_folder: ModelFolder) -> None:
    loaded = load(model_folder("gemma2"))
    assert "one at a time" in loaded.notes[0]
    prompts = [TEXT[: 3 + 2 * i] for i in range(4)]
    alone = [Driver(loaded).one(prompt=prompt, max_tokens=8).text for prompt in prompts]
    driver = Driver(loaded, max_rows=8)
    for i, prompt in enumerate(prompts):
        driver.engine.submit(generate(i, prompt=prompt, max_tokens=8))
    while driver.engine.busy:
        driver.engine.step()
        assert driver.engine.stats().rows <= 1
    assert [driver.answers[i].text for i in range(4)] == alone


class Wrong:
    """A model that takes all rows for as long as the first, whenever there are several."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        if tokens.shape[0] > 1:
            cache = [SameOffset(layer) for layer in cache]
        return self._model(tokens, cache=cache)


class SameOffset:
    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def offset(self) -> int:
        return int(mx.array(self._layer.offset).reshape(-1)[0].item())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def test_silently_wrong_is_found_out(llama: LoadedModel) -> None:
    assert batches(llama.model, llama.layout, llama.vocabulary)
    assert not batches(Wrong(llama.model), llama.layout, llama.vocabulary)


def test_trial_calls_do_not_wait_to_be_computed_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: LoadedModel
) -> None:
    """Of two, a layer of one needs only that of the other: they would run at once, at the same places."""
    waiting, call = [], Caches.call

    def watched(self: Caches, *arguments: Any, **options: Any) -> mx.array:
        waiting.append(bool(with_views(tmp_path, *self.arrays)) if self.arrays else False)
        return call(self, *arguments, **options)

    monkeypatch.setattr(Caches, "call", watched)
    assert batches(llama.model, llama.layout, llama.vocabulary)
    assert fuses_prompts(llama.model, llama.layout, llama.layout, llama.vocabulary)
    assert waiting == [False] * 8


def test_a_model_that_fails_even_alone_is_not_taken_for_one_that_does_not_batch(llama: LoadedModel) -> None:
    def broken(tokens: mx.array, cache: Any) -> mx.array:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        batches(broken, llama.layout, llama.vocabulary)
