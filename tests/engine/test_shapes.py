"""How many shapes a batch comes to whose graphs are kept, and what its room takes of memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from runner.engine import traced
from runner.engine.kv import attention_kernel
from runner.engine.kv.planes import Planes
from runner.engine.loader import LoadedModel, load
from runner.engine.memory import cache_bytes_per_token
from runner.engine.sharing import TOGETHER
from runner.protocol import Configure
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import separately

LAYERS = 3


class Seen:
    """Graphs that were built to be kept, by rows and room, and copies of all keys and values."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.copies = 0
        self.steps = 0

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As `mx.compile`."""

        def tracing(*arguments: Any) -> Any:
            self.shapes.append((*arguments[0].shape, *arguments[3][0][0].shape))
            return function(*arguments)

        return mx.compile(tracing)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on."""
        for name in ("reserve", "shrink"):
            monkeypatch.setattr(Planes, name, self._counted(getattr(Planes, name)))

    def _counted(self, resize: Callable[..., None]) -> Callable[..., None]:
        def counted(planes: Planes, *arguments: Any) -> None:
            before = [array.shape for array in planes._arrays]
            resize(planes, *arguments)
            self.copies += bool(before) and before != [array.shape for array in planes._arrays]

        return counted


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """As if there were a device, with graphs that are really kept."""
    found = Seen()
    found.watch(monkeypatch)
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    monkeypatch.setattr(traced, "compiled", found.compile)
    mx.enable_compile()
    yield found
    mx.disable_compile()


def kept_busy(loaded: LoadedModel, rows: int, steps: int, **limits: Any) -> Driver:
    """So many rows for so many steps, each followed by another one when it ends: 150 tokens, and 60 to 80 more, which
    is beyond 256 for the rows of none, but with what is ahead of the prompts of some."""
    driver, number = Driver(loaded, sharing=TOGETHER, max_rows=rows, prefix_cache_bytes=0, **limits), 0
    for _ in range(steps):
        while len(driver.engine.rows) < rows:
            prompt = [5 + (number + i) % 200 for i in range(200 + number % 3)]
            driver.engine.submit(generate(number, prompt=prompt, max_tokens=60 + 7 * number % 20))
            number += 1
        driver.engine.step()
    return driver


def test_a_batch_that_is_kept_busy_settles_on_a_shape(model_folder: ModelFolder, seen: Seen) -> None:
    """Rows pass 256 tokens, and there is room for it from the start."""
    kept_busy(load(model_folder("llama")), rows=4, steps=100)
    decoding = [shape for shape in seen.shapes if shape[1] == 1]
    assert {shape[2:] for shape in decoding} == {(4, 2, 512, 16)}
    assert len(decoding) == len(set(decoding)) <= 3
    assert seen.copies == 0


def test_rows_that_join_one_by_one_seldom_copy_the_batch(model_folder: ModelFolder, seen: Seen) -> None:
    loaded = load(model_folder("llama"))
    made = []
    for limit in (0, 1 << 30):
        seen.copies = 0
        driver = Driver(loaded, memory_limit=limit, sharing=TOGETHER, max_rows=12, prefix_cache_bytes=0)
        for number in range(12):
            driver.engine.submit(generate(number, prompt=[5 + number] * 20, max_tokens=200))
            while driver.engine.stats().rows <= number:
                driver.engine.step()
        made.append(seen.copies // LAYERS)
    # Without a limit by a third, from one slot to 13. With one, where it has room, by as many as there are.
    assert made == [8, 3]


@pytest.mark.parametrize("slack", [0, 700, 2048])
def test_what_the_batch_takes_is_what_was_counted(model_folder: ModelFolder, seen: Seen, slack: int) -> None:
    loaded = load(model_folder("llama"))
    each, chosen = cache_bytes_per_token(loaded.model, loaded.layout), random.Random(3)
    budget = int(loaded.weights_bytes + (4 * 512 + slack) * each)
    driver = Driver(loaded, memory_limit=budget, sharing=TOGETHER, max_rows=16, prefix_cache_bytes=0)
    sizes = [(chosen.randint(2, 150), chosen.choice((5, 20, 20, 120))) for _ in range(30)]
    for number, (prompt, more) in enumerate(sizes):
        driver.engine.submit(generate(number, prompt=[5] * prompt, max_tokens=more))
    most = 0
    while driver.engine.busy:
        driver.engine.step()
        rows, held = driver.engine.stats().rows, driver.engine._batch.nbytes
        assert loaded.weights_bytes + held <= budget or rows <= 1
        most = max(most, rows)
    assert [driver.answers[i].tokens for i in range(30)] == [more for _, more in sizes]
    assert most >= 3


def one_of_eight(loaded: LoadedModel, tokens: int, **first: Any) -> Driver:
    """The first of eight rows when the others have ended, in a batch that has room for so many tokens."""
    each = cache_bytes_per_token(loaded.model, loaded.layout)
    limit = int(loaded.weights_bytes + tokens * each)
    driver = Driver(loaded, memory_limit=limit, sharing=TOGETHER, max_rows=8, prefix_cache_bytes=0)
    for number in range(8):
        driver.engine.submit(generate(number, prompt=[5 + number] * 20, **({"max_tokens": 4} if number else first)))
    while driver.engine.stats().rows != 1 or len(driver.answers) < 8:
        driver.engine.step()
    assert not driver.answers[0].ends
    return driver


def test_a_longer_row_is_not_counted_with_the_slots_of_those_that_have_gone(
    model_folder: ModelFolder, seen: Seen
) -> None:
    driver = one_of_eight(load(model_folder("llama")), 10 * 256, max_tokens=230)
    assert driver.engine._batch.room == (8, 256)
    driver.engine.submit(generate(9, prompt=[9] * 20, max_tokens=450))
    while driver.engine.stats().rows < 2:
        driver.engine.step()
        assert not driver.answers[0].ends
    assert driver.engine._batch.room == (2, 512)


def test_room_that_a_batch_keeps_is_counted_with_the_slots_that_a_row_adds(
    model_folder: ModelFolder, seen: Seen
) -> None:
    """Three slots of 512 tokens, left by a row that was cancelled, would become four, which there is no memory for."""
    loaded = load(model_folder("llama"))
    each = cache_bytes_per_token(loaded.model, loaded.layout)
    limit = int(loaded.weights_bytes + 4 * 512 * each)
    driver = Driver(loaded, memory_limit=limit, sharing=TOGETHER, max_rows=4, prefix_cache_bytes=0)
    for number, tokens in enumerate((200, 200, 300)):
        driver.engine.submit(generate(number, prompt=[5 + number] * 20, max_tokens=tokens))
    while driver.engine.stats().rows < 3:
        driver.engine.step()
    driver.engine.cancel(2)
    driver.engine.configure(Configure(memory_limit_bytes=int(loaded.weights_bytes + 1900 * each)))
    for number in (3, 4):
        driver.engine.submit(generate(number, prompt=[5 + number] * 20, max_tokens=200))
        while number not in driver.answers:
            driver.engine.step()
            assert driver.engine._batch.nbytes <= 1900 * each
    assert driver.engine._batch.room == (4, 256)


def test_room_to_spare_is_given_back_before_a_row_has_to_end(model_folder: ModelFolder, seen: Seen) -> None:
    loaded = load(model_folder("llama"))
    each = cache_bytes_per_token(loaded.model, loaded.layout)
    driver = one_of_eight(loaded, 10 * 512)
    assert driver.engine._batch.room == (8, 512)
    driver.engine.configure(Configure(memory_limit_bytes=int(loaded.weights_bytes + 3 * 512 * each)))
    assert driver.engine._batch.room == (1, 512)
    tokens = driver.answers[0].tokens
    for _ in range(20):
        driver.engine.step()
    assert driver.answers[0].tokens >= tokens + 19


def test_states_are_not_padded(model_folder: ModelFolder, seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    """They have no slots: a graph of more rows would fail, and steps be built each time."""
    driver = Driver(load(model_folder("lfm2")), sharing=TOGETHER, prefix_cache_bytes=0)
    driver.run(generate(i, prompt=[5 + i] * 9, max_tokens=10 if i < 2 else 30) for i in range(9))
    assert {shape[0] for shape in seen.shapes if shape[1] == 1} == {7, 9}
    assert "built each time" not in caplog.text
