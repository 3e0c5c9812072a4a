"""Prompts share model calls, and wait for each other where that pays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from msgspec import structs

from runner.engine.kv import attention_kernel, prompt_kernel
from runner.engine.kv.caches import Caches
from runner.engine.loader import LoadedModel, load
from runner.engine.pacing import Pacing
from runner.engine.sharing import AT_ONCE, TOGETHER, Sharing, usual
from tests.bench.sharing import CPU, H100, H200, Costs, Load, Loop, at
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import separately
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox jumps over the lazy dog")
PATIENT = Sharing(times=4, most=128, rows=2, steps=3, roomier=4)


def test_where_a_prompt_costs_what_its_tokens_cost_nobody_waits() -> None:
    assert AT_ONCE.tokens(512) == 512
    assert not any(AT_ONCE.holds(decoding, 1, 0) for decoding in range(1000))


@pytest.mark.parametrize(("chunk", "tokens"), [(64, 256), (512, 2048), (1024, 2048), (2048, 2048), (4096, 4096)])
def test_calls_that_are_shared_are_wider_within_bounds(chunk: int, tokens: int) -> None:
    assert TOGETHER.tokens(chunk) == tokens


@pytest.mark.parametrize(("decoding", "needed"), [(0, 1), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (128, 8)])
def test_large_batches_wait_for_more_prompts_but_not_long(decoding: int, needed: int) -> None:
    assert [TOGETHER.holds(decoding, ready, 0) for ready in range(1, 10)] == [ready < needed for ready in range(1, 10)]
    assert not any(TOGETHER.holds(decoding, 1, held) for held in range(TOGETHER.steps, 10))


@pytest.mark.parametrize(
    ("decoding", "ready", "spent", "holds"),
    [
        (0, 1, 0, False),  # nothing is computed meanwhile
        (1, 1, 0, True),
        (1, 1, 1, True),
        (1, 1, 2, False),
        (24, 7, 35, True),
        (24, 7, 42, False),
    ],
)
def test_who_is_expected_is_waited_for_as_long_as_a_call_more_would_cost(
    decoding: int, ready: int, spent: int, holds: bool
) -> None:
    assert TOGETHER.holds(decoding, ready, 1, spent, expected=1) == holds
    assert not TOGETHER.holds(decoding, ready, 1, spent)
    assert not TOGETHER.holds(decoding, ready, TOGETHER.steps, spent, expected=1)


@pytest.mark.parametrize(("needed", "batch", "room"), [(255, 512, 512), (9, 1024, 1024), (9, 1280, 0), (600, 512, 0)])
def test_prompts_get_the_room_of_the_batch_within_bounds(needed: int, batch: int, room: int) -> None:
    assert TOGETHER.room(needed, batch) == room
    assert AT_ONCE.room(needed, batch) == 0


@pytest.mark.parametrize(
    ("before", "tokens", "width"), [(0, 255, 256), (0, 256, 256), (250, 255, 262), (3, 16, 16), (0, 17, 32), (0, 1, 1)]
)
def test_keys_of_a_call_are_a_multiple_where_they_are_many(before: int, tokens: int, width: int) -> None:
    assert TOGETHER.width(before, tokens) == width
    assert AT_ONCE.width(before, tokens) == tokens


@pytest.mark.parametrize(
    ("before", "tokens", "reach", "width"),
    [
        (0, 250, 512, 256),
        (5, 250, 512, 256),
        (5, 256, 512, 256),
        (5, 257, 512, 288),
        (3, 512, 1024, 512),
        (3, 513, 1024, 576),
        (5, 16, 512, 16),
        # No further than there is room; where there is none, as if there were no launches.
        (5, 241, 256, 248),
        (5, 250, 256, 250),
        (5, 251, 256, 251),
        (8, 250, 256, 280),
    ],
)
def test_what_is_known_does_not_change_widths_where_launches_attend(
    before: int, tokens: int, reach: int, width: int
) -> None:
    assert TOGETHER.width(before, tokens, reach) == width


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)
    assert usual() is (TOGETHER if on_cuda else AT_ONCE)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert usual() is TOGETHER


@pytest.mark.parametrize(("clients", "gain", "later"), [(8, 0.99, 1), (32, 1.08, 10), (128, 1.35, 10)])
def test_it_is_reckoned_to_pay(clients: int, gain: float, later: float) -> None:
    """Large batches say much more for it; in small ones nobody waits long."""
    load = Load(clients, seconds=6)
    before, after = Loop(load, AT_ONCE, costs=H100).run(), Loop(load, TOGETHER, costs=H100).run()
    assert after.tokens_per_second > gain * before.tokens_per_second
    assert at(after.first, 0.5) < at(before.first, 0.5) + later


@pytest.mark.parametrize(
    ("clients", "spread", "gain", "later"),
    [
        *((8, 0.0, 0.995, 1), (32, 0.0, 1.04, 6), (128, 0.0, 0.995, 1)),
        *((8, 0.02, 1.01, 1), (32, 0.02, 1.05, 3), (128, 0.02, 0.995, 1)),
        *((8, 0.5, 1.0, 1), (32, 0.5, 1.01, 2), (128, 0.5, 0.995, 1)),
    ],
)
def test_it_is_reckoned_to_pay_that_prompts_wait_for_those_that_follow(
    clients: int, spread: float, gain: float, later: float
) -> None:
    """Answers of one length end together; what comes 1 to 3 ms later has nearly what comes at once."""
    load, deaf = Load(clients, spread=spread, max_rows=128), structs.replace(TOGETHER, call=0.0)
    before, after = Loop(load, deaf, Pacing()).run(), Loop(load, TOGETHER, Pacing()).run()
    alone = Loop(load, TOGETHER, Pacing(), replace(H200, client=(0.0, 0.0))).run()
    assert after.tokens_per_second > gain * before.tokens_per_second
    assert after.tokens_per_second > 0.98 * alone.tokens_per_second
    assert at(after.first, 0.5) < at(before.first, 0.5) + later


@pytest.mark.parametrize("rate", [10, 40, 80, 120])
def test_requests_that_follow_on_nothing_wait_little_longer(rate: float) -> None:
    load, deaf = Load(0, max_rows=128, rate=rate), structs.replace(TOGETHER, call=0.0)
    before, after = Loop(load, deaf, Pacing()).run(), Loop(load, TOGETHER, Pacing()).run()
    assert at(after.first, 0.5) < at(before.first, 0.5) + 1.5
    assert at(after.first, 0.99) < at(before.first, 0.99) + 4


@pytest.mark.parametrize(
    ("costs", "sharing", "load", "share"),
    [
        (CPU, AT_ONCE, Load(8, prompt=100, answer=32, seconds=120), 0.97),
        (CPU, AT_ONCE, Load(16, prompt=100, answer=32, seconds=120), 0.96),
        (H100, TOGETHER, Load(8), 0.99),
        (H100, TOGETHER, Load(32), 0.985),
        (H200, TOGETHER, Load(8), 0.985),
        (H200, TOGETHER, Load(32), 0.985),
    ],
)
def test_pacing_is_reckoned_to_cost_little(costs: Costs, sharing: Sharing, load: Load, share: float) -> None:
    """Of the tokens that all of a call at once brings; and what it is for is still there."""
    before, after = Loop(load, sharing, costs=costs).run(), Loop(load, sharing, Pacing(), costs).run()
    assert after.tokens_per_second > share * before.tokens_per_second
    assert at(after.between, 0.99) < 0.8 * at(before.between, 0.99)


# ------------------------------------------------------------- in the engine


class AtOnce(Pacing):
    """Has nobody wait for what it might learn, and starts all layers of a call."""

    def knows(self, decoding: int) -> bool:
        return True

    def layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        return layers


def decoding(llama: LoadedModel, rows: int, sharing: Sharing = PATIENT, **limits: int) -> Driver:
    """An engine in which so many rows decode, and go on for long."""
    driver = Driver(llama, sharing=sharing, **{"prefill_step_size": 32, **limits})
    driver.engine._prefiller.pacing = AtOnce()
    for i in range(rows):
        driver.engine.submit(generate(1000 + i, prompt=PROMPT[:4], max_tokens=200))
    driver.engine.step()
    assert driver.engine.stats().rows == rows
    return driver


def steps_until(driver: Driver, rows: int) -> int:
    """How many steps it takes until so many rows are in the batch."""
    for steps in range(1, 30):
        driver.engine.step()
        if driver.engine.stats().rows >= rows:
            return steps
    raise AssertionError("they never join")


@pytest.mark.parametrize(
    ("arriving", "steps"), [(1, PATIENT.steps + 1), (2, PATIENT.steps + 1), (3, 1)], ids=["one", "two", "enough"]
)
def test_prompts_wait_until_they_are_enough_but_not_long(llama: LoadedModel, arriving: int, steps: int) -> None:
    driver = decoding(llama, 6)
    for i in range(arriving):
        driver.engine.submit(generate(i, prompt=PROMPT[: 5 + i], max_tokens=20))
    assert steps_until(driver, 6 + arriving) == steps
    if steps > 1:
        assert driver.answers[1000].tokens >= steps, "the others go on"
        driver.engine.submit(generate(9, prompt=PROMPT[:5], max_tokens=20))
        assert steps_until(driver, 7 + arriving) == steps, "the next ones wait as long"


def test_one_that_comes_last_brings_the_others_with_it(llama: LoadedModel) -> None:
    driver = decoding(llama, 6)
    for i in range(2):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=20))
    driver.engine.step()
    assert driver.engine.stats().rows == 6
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=20))
    driver.engine.step()
    assert driver.engine.stats().rows == 9


def test_prompts_that_fill_a_call_do_not_wait(llama: LoadedModel) -> None:
    """Two of 50 tokens leave no room for a third in 128, and what is longer than a chunk shares with nobody."""
    driver = decoding(llama, 6, prefill_step_size=50)
    for i in range(2):
        driver.engine.submit(generate(i, prompt=[9 + i] * 50, max_tokens=20))
    driver.engine.step()
    assert driver.engine.stats().rows == 8
    driver.engine.submit(generate(2, prompt=[7] * 60, max_tokens=20))
    driver.engine.step()
    assert driver.engine.stats().prefilling == 1


def test_nobody_waits_where_nothing_decodes_or_few_rows_do(llama: LoadedModel) -> None:
    driver = decoding(llama, 2)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=20))
    assert steps_until(driver, 3) == 1


def test_one_free_row_is_not_waited_for_long_while_others_leave(llama: LoadedModel) -> None:
    """Of a queue, only those count for whom there is a row."""
    driver = decoding(llama, 7, max_rows=8)
    for i in range(4):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=20))
    driver.engine.step()
    assert driver.engine.stats().rows == 7
    for i in range(3):
        driver.engine.cancel(1000 + i)
    driver.engine.step()
    assert driver.engine.stats().rows == 8


def test_a_prompt_that_is_cancelled_while_it_waits_is_gone(llama: LoadedModel) -> None:
    driver = decoding(llama, 6)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=20))
    driver.engine.step()
    driver.engine.step()
    driver.engine.cancel(1)
    driver.engine.step()
    assert driver.engine.stats().waiting == 0
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=20))
    assert steps_until(driver, 7) == PATIENT.steps + 1, "who comes later has not waited"


def test_prompts_share_more_than_a_chunk_and_long_ones_do_not(llama: LoadedModel) -> None:
    driver = Driver(llama, sharing=PATIENT, prefill_step_size=32)
    for i in range(5):
        driver.engine.submit(generate(i, prompt=[9 + i] * 31, max_tokens=20))
    driver.engine.submit(generate(9, prompt=[5] * 120, max_tokens=2))
    driver.engine.step()
    assert driver.engine.stats().rows == 4, "four of 30 tokens are 120; one more would be 150"
    steps_until(driver, 5)
    driver.drain()
    alone = [Driver(llama).one(prompt=[9 + i] * 31, max_tokens=20).text for i in range(5)]
    assert [driver.answers[i].text for i in range(5)] == alone
    assert driver.answers[9].tokens == 2


def test_a_wide_call_needs_room(model_folder: ModelFolder) -> None:
    """Where memory is short, calls are no wider than a long prompt's are."""
    loaded = load(model_folder("llama"))
    for granted, joined in ((1 << 30, 4), (1 << 24, 1)):
        driver = Driver(loaded, sharing=PATIENT, prefill_step_size=32)
        driver.engine.budget.granted, driver.engine.budget.working = granted, 12 << 20
        for i in range(4):
            driver.engine.submit(generate(i, prompt=[9 + i] * 31, max_tokens=4))
        driver.engine.step()
        assert driver.engine.stats().rows == joined
        driver.drain()
        assert [driver.answers[i].tokens for i in range(4)] == [4] * 4


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of each of a model's calls that is built."""
    found: list[tuple[int, int]] = []
    healthy = Caches.call

    def call(self: Caches, model: Any, tokens: mx.array, lengths: Sequence[int] | None = None) -> mx.array:
        found.append((tokens.shape[0], tokens.shape[1]))
        return healthy(self, model, tokens, lengths)

    monkeypatch.setattr(Caches, "call", call)
    return found


def launches(monkeypatch: pytest.MonkeyPatch, *, prompts: bool, fits: bool = True) -> None:
    """As if there were a device, with launches for prompts or not, which models are such as `fits` them or not."""
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    if prompts:
        monkeypatch.setattr(prompt_kernel, "launch", lambda: separately)
        monkeypatch.setattr(prompt_kernel, "takes", lambda *_: fits)


@pytest.mark.parametrize("prompts", [False, True], ids=["operations", "launches"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2", "qwen3_moe"])
def test_calls_that_are_padded_say_the_same(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    widths: list[tuple[int, int]],
    model_type: str,
    prompts: bool,
) -> None:
    """Short prompts together and alone, long ones in chunks, and such as begin with what is known."""
    expected = Driver(load(model_folder(model_type)), prefill_step_size=24, prefix_cache_bytes=1 << 22)
    launches(monkeypatch, prompts=prompts)
    loaded = load(model_folder(model_type))
    padded = Driver(
        loaded, sharing=Sharing(times=4, most=96, multiple=20), prefill_step_size=24, prefix_cache_bytes=1 << 22
    )
    for driver in (expected, padded):
        widths.clear()
        for first in (0, 10):
            lengths = (4, 19, 24, 43, 30 + first)
            driver.run([generate(first + i, prompt=(PROMPT * 8)[:n], max_tokens=12) for i, n in enumerate(lengths)])
    found = {i: answer.text for i, answer in padded.answers.items()}
    assert found == {i: answer.text for i, answer in expected.answers.items()}
    # Of 24 tokens at most. A window's ring of 24 has no room for more; behind others, operations attend, to 40 keys.
    assert (37 if prompts and model_type == "gemma3_text" else 40) in {width for _, width in widths}
    assert len(found) == 10


@pytest.mark.parametrize(
    ("prompts", "fits", "shapes"),
    [(False, True, 18), (True, False, 18), (True, True, 3)],
    ids=["operations", "a model that is none for launches", "launches"],
)
def test_prompts_of_about_a_length_come_to_few_shapes(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    widths: list[tuple[int, int]],
    prompts: bool,
    fits: bool,
    shapes: int,
) -> None:
    """50 of 200 to 260 tokens beside 0 to 6 that are known, as a chat template's first ones are."""
    launches(monkeypatch, prompts=prompts, fits=fits)
    driver = Driver(load(model_folder("llama")), sharing=TOGETHER, prefix_cache_bytes=1 << 24)
    driver.one(prompt=PROMPT[:7], max_tokens=1)
    widths.clear()
    dice, known = random.Random(5), set()
    for i in range(50):
        prompt = [*PROMPT[: i % 7], i, *(dice.randrange(5, 200) for _ in range(dice.randint(200, 260)))]
        before = driver.engine.stats().cached_tokens_total
        driver.engine.submit(generate(i, prompt=prompt, max_tokens=60))
        driver.engine.step()
        known.add(driver.engine.stats().cached_tokens_total - before)
        driver.engine.cancel(i)
        driver.engine.step()
    assert known == {0, 1, 2, 3, 4, 5, 6}
    assert len({width for _, width in widths if width > 1}) == shapes
