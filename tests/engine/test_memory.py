"""A declared limit decides how many rows run, not whether requests are answered."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel, load
from runner.engine.memory import MemoryBudget, cache_bytes, cache_bytes_per_token
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.tiny import encode

STEP = 256
"""Tokens that caches grow by."""

PROMPT = encode("the quick brown fox, hello world. def main")


@pytest.fixture(scope="module")
def token_bytes(llama: LoadedModel) -> float:
    return cache_bytes_per_token(llama.model, llama.layout)


def test_a_token_is_what_the_caches_hold_for_it(llama: LoadedModel, token_bytes: float) -> None:
    layers, heads, width, keys_and_values, size = 3, 2, 16, 2, 4
    assert token_bytes == layers * heads * width * keys_and_values * size


def limited(llama: LoadedModel, token_bytes: float, tokens: int, **limits: int) -> Driver:
    """An engine with room for the weights and `tokens` tokens."""
    return Driver(llama, memory_limit=int(llama.weights_bytes + tokens * token_bytes), **limits)


def test_rows_wait_for_room_and_are_answered(llama: LoadedModel, token_bytes: float) -> None:
    driver = limited(llama, token_bytes, 2 * STEP)
    for i in range(6):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=10))
    assert driver.most_rows() == 2
    assert [driver.answers[i].tokens for i in range(6)] == [10] * 6


def test_one_that_never_fits_is_refused(llama: LoadedModel, token_bytes: float) -> None:
    answer = limited(llama, token_bytes, 30).one(prompt=PROMPT, max_tokens=40)
    assert answer.rejected is not None
    assert (answer.rejected.status, answer.rejected.code) == (400, "memory_limit_exceeded")


def test_kept_prefixes_give_way_to_rows(llama: LoadedModel, token_bytes: float) -> None:
    each = len(PROMPT) + 10
    driver = limited(llama, token_bytes, STEP + each, prefix_cache_bytes=1 << 20)
    driver.one(prompt=PROMPT, max_tokens=10)
    assert driver.engine.stats().prefix_cache_bytes > 5 * token_bytes
    other = PROMPT[::-1]
    assert driver.one(prompt=other, max_tokens=10).tokens == 10
    kept = driver.engine.stats().prefix_cache_bytes
    assert kept <= 1.5 * each * token_bytes, "only the newer one is left"


def test_the_batch_is_counted_padded(model_folder: ModelFolder, token_bytes: float) -> None:
    driver = Driver(load(model_folder("llama")))
    rows = [
        driver.engine.intake._admission.row(generate(i, prompt=[5] * n, max_tokens=4), 0)
        for i, n in enumerate((10, 30))
    ]

    def twice(tokens: int) -> float:
        return 2.0 * tokens

    assert MemoryBudget(1000, 100, twice).excess(rows, 50) == 100 + 50 + 2 * STEP * 2 - 1000
    assert MemoryBudget(1000, 100, twice).excess([], 50) == -850
    assert MemoryBudget(1000, 100, twice, row_bytes=300).excess(rows, 50) == 100 + 50 + 2 * 300 - 1000


@pytest.mark.parametrize("start", [0, 300, 1024])
@pytest.mark.parametrize("tokens", [100, 400, 900])
def test_caches_with_a_threshold_are_counted_as_they_are(model_folder: ModelFolder, start: int, tokens: int) -> None:
    """Up to it plain ones, beyond it both."""
    model = load(model_folder("llama", wide=True), quantisation=Quantisation(8, 32, start))
    caches = model.layout.new(3)
    for at in range(0, tokens, 100):
        caches.call(model.model, mx.zeros((3, 100), dtype=mx.uint32), [100, 1, 40] if at else None)
        mx.eval(caches.arrays)
    slots, room = caches.room
    assert (slots, room >= tokens) == (3, True)
    assert caches.nbytes == slots * cache_bytes(model.model, model.layout)(room)
