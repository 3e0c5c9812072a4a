"""A prompt's model call is started layer by layer, so that running rows wait for a part of it at most."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from runner.engine import prompt_calls
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel, load
from runner.engine.pacing import Pacing
from runner.protocol import Step
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.tiny import encode

STEP = 0.002
"""Seconds of a simulated step."""

SETTLING = 2
"""Steps after a call, in which the device may still be at it."""

PROMPT = encode("the quick brown fox jumps over the lazy dog")


class Simulated:
    """Steps of a batch, longer by the layers started in them: at once, or, as a device is waited for, the next."""

    def __init__(self, layer_seconds: float, layers: int = 16, *, late: bool = False, step: float = STEP) -> None:
        self.pacing = Pacing()
        self.steps: list[float] = []
        self._layer_seconds, self._layers, self._late = layer_seconds, layers, late
        self._step = step
        self._owed = 0.0

    def step(self, layers: int = 0, *, changed: bool = False) -> None:
        """One step, in which so many layers are started."""
        work = layers * self._layer_seconds
        seconds = self._step + (self._owed if self._late else work)
        self._owed = work
        self.steps.append(seconds)
        self.pacing.stepped(seconds, 32, changed=changed)

    def quiet(self) -> None:
        """Steps after which a prompt comes alone."""
        for _ in range(40):
            self.step()

    def call(self, tokens: int = 256, decoding: int = 16, waiting: int = 1, prompts: float = 1) -> int:
        """A prompt's call; returns in how many steps it was started."""
        self.pacing.begun(tokens, self._layers, prompts)
        steps = left = 0
        left = self._layers
        while left > 0:
            layers = min(left, self.pacing.layers(tokens, self._layers, decoding, waiting))
            left -= layers
            steps += 1
            if not left:
                self.pacing.started()
            self.step(layers, changed=not left)
        for _ in range(SETTLING):
            self.step()
        return steps


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("layer_seconds", "steps"), [(0.00001, 1), (0.0003, 3), (0.002, 16), (0.02, 16)])
def test_steps_become_twice_as_long_at_most_where_layers_allow(layer_seconds: float, steps: int, late: bool) -> None:
    simulated = Simulated(layer_seconds, late=late)
    simulated.quiet()
    assert simulated.call() == 1, "nothing is known of a layer yet"
    simulated.quiet()
    del simulated.steps[:]
    assert simulated.call() == pytest.approx(steps, abs=1)
    assert max(simulated.steps) <= STEP + max(STEP * 1.01, layer_seconds)
    assert median(simulated.steps) >= STEP


def test_nobody_waits_where_nobody_runs_or_nothing_is_known() -> None:
    simulated = Simulated(0.0009)
    assert simulated.pacing.layers(256, 16, 16, 1) == 16
    simulated.quiet()
    simulated.call()
    assert simulated.pacing.layers(256, 16, 16, 1) == 2
    assert simulated.pacing.layers(256, 16, 0, 1) == 16


def learnt(layer_seconds: float, step: float = STEP) -> Pacing:
    """What has seen such steps, and a call of 256 tokens."""
    simulated = Simulated(layer_seconds, step=step)
    simulated.quiet()
    simulated.call()
    return simulated.pacing


def test_a_call_is_spread_the_less_the_more_of_the_batch_it_brings() -> None:
    pacing = learnt(0.0009)
    assert [pacing.layers(256, 16, decoding, 1) for decoding in (1, 2, 4, 8, 16, 32, 128)] == [16, 16, 8, 4, 2, 1, 1]
    assert [pacing.layers(256, 16, 128, waiting) for waiting in (1, 8, 16, 32, 128)] == [1, 2, 4, 8, 16]


def test_rows_that_decode_wait_half_a_step_at_least() -> None:
    assert [learnt(0.0002).layers(256, 16, decoding, 1) for decoding in (16, 24, 32, 128)] == [8, 6, 4, 4]


def test_long_steps_become_twice_as_long_at_most_unless_more_prompts_wait_than_rows_decode() -> None:
    pacing = learnt(0.02, step=0.05)
    assert [pacing.layers(256, 16, 1, waiting) for waiting in (1, 2, 4, 16)] == [2, 4, 8, 16]
    assert [pacing.layers(256, 16, 8, waiting) for waiting in (1, 8, 16)] == [2, 2, 4]
    assert learnt(0.004, step=0.005).layers(256, 16, 2, 1) == 4, "20 ms go unnoticed, 40 would not"


@pytest.mark.parametrize(("between", "steps"), [(40, 16), (24, 8), (12, 6), (5, 2), (2, 2)])
def test_a_call_takes_half_of_the_steps_between_prompts_or_two(between: int, steps: int) -> None:
    simulated = Simulated(0.002)
    simulated.quiet()
    for _ in range(20):
        taken = simulated.call()
        for _ in range(between - taken - SETTLING):
            simulated.step()
    assert taken == steps


def test_chunks_of_a_prompt_are_no_prompts_of_their_own() -> None:
    def after(prompts: float) -> list[int]:
        simulated = Simulated(0.002)
        for _ in range(2):
            simulated.quiet()
            simulated.call()
        return [simulated.call(prompts=prompts) for _ in range(8)]

    assert after(0.25) == [4] * 8, "a quarter of the steps for each"
    assert after(1) == [8, 8, 8, 6, 6, 4, 4, 4]


def test_what_is_not_known_of_a_width_is_taken_from_the_nearest() -> None:
    pacing = learnt(0.00045)
    assert pacing.layers(256, 16, 16, 1) == 4
    assert pacing.layers(1024, 16, 16, 1) == 1
    assert pacing.layers(32, 16, 16, 1) == 4


def test_it_is_seen_again_how_long_steps_are() -> None:
    simulated = Simulated(0.0001)
    assert not simulated.pacing.knows(32)
    for _ in range(3):
        simulated.step()
    assert [rows for rows in range(100) if simulated.pacing.knows(rows)] == list(range(16, 66))
    for _ in range(16):
        simulated.call()
    assert simulated.pacing.knows(32)
    for _ in range(64):  # never without a prompt
        simulated.pacing.begun(256, 16, 1)
        simulated.step(1)
    assert not simulated.pacing.knows(32)
    simulated.pacing.started()
    for _ in range(4):
        simulated.step()
    assert simulated.pacing.knows(32)
    assert simulated.pacing.step == pytest.approx(STEP)


@pytest.mark.parametrize(("decoding", "arriving", "least", "most"), [(2, 1, 5, 6), (1, 1, 2, 2), (2, 4, 2, 2)])
def test_prompts_wait_for_that_but_not_long_nor_where_they_are_as_many(
    llama: LoadedModel, decoding: int, arriving: int, least: int, most: int
) -> None:
    driver = Driver(llama)
    for i in range(decoding):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=40))
    driver.engine.step()
    for i in range(arriving):
        driver.engine.submit(generate(10 + i, prompt=PROMPT, max_tokens=3))
    began = driver.engine.stats().steps_total
    while 10 not in driver.answers:
        driver.engine.step()
    assert least <= driver.engine.stats().steps_total - began <= most


def test_a_hiccup_is_not_taken_for_what_layers_cost() -> None:
    simulated = Simulated(0.00018)
    simulated.quiet()
    simulated.call()
    before = simulated.pacing.layers(256, 16, 16, 1)
    simulated.pacing.begun(256, 16, 1)
    simulated.pacing.started()
    for _ in range(2):
        simulated.pacing.stepped(5.0, 32, changed=False)
    assert before // 2 <= simulated.pacing.layers(256, 16, 16, 1) < before
    for _ in range(8):
        simulated.call()
    assert simulated.pacing.layers(256, 16, 16, 1) == before


def test_building_and_joining_are_not_taken_for_what_layers_cost() -> None:
    """They are as long as ten layers each. With these, the first call says less than it should, and later ones more."""
    simulated = Simulated(0.0002)
    simulated.quiet()
    found = []
    for _ in range(12):
        pacing = simulated.pacing
        pacing.begun(256, 16, 1)
        apart = pacing.apart(32, 1)
        found.append((apart, pacing._layers(256, 16, 32, 1)))
        if apart:
            pacing.stepped(STEP + 0.002, 32, changed=False)
        left = 16
        while left > 0:
            layers = pacing.layers(256, 16, 32, 1)
            left -= layers
            if left <= 0:
                pacing.started()
            building = 0.002 if left + layers == 16 and not apart else 0.0
            joining = 0.002 if left <= 0 and not apart else 0.0
            pacing.stepped(STEP + layers * 0.0002 + building + joining, 32, changed=joining > 0)
        if apart:
            pacing.stepped(STEP + 0.002, 32, changed=True)
        simulated.quiet()
    assert found[0] == (False, 16)
    assert found[1] == (True, 2), "all that is known is the whole"
    assert found[-1] == (True, 4)


def test_building_and_joining_have_steps_of_their_own_where_rows_are_many() -> None:
    pacing = learnt(0.0002)
    assert [pacing.apart(decoding, 1) for decoding in (1, 15, 16, 128)] == [False, False, True, True]
    assert [pacing.apart(32, waiting) for waiting in (1, 2, 3)] == [True, True, False]
    assert not Pacing().apart(128, 1), "nothing is known"


class Apart(Pacing):
    """Has steps of their own for everything."""

    def layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        return 2

    def apart(self, decoding: int, waiting: int) -> bool:
        return decoding > 0


@pytest.mark.parametrize(("prompt", "steps"), [(PROMPT[1:17], 4), ((5 * PROMPT)[1:41], 10)])
def test_a_step_builds_a_call_or_starts_layers_or_has_rows_join(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, prompt: list[int], steps: int
) -> None:
    """Three layers, two in a step; a long prompt has three calls, of which the last makes it ready."""
    alone = Driver(llama).one(prompt=prompt, max_tokens=5).text
    driver = Driver(llama, prefill_step_size=16)
    driver.engine._prefiller.pacing = Apart()
    driver.engine.submit(generate(0, prompt=PROMPT, max_tokens=60))
    while driver.engine.stats().rows < 1:
        driver.engine.step()
    started: list[int] = []
    start = prompt_calls.start
    monkeypatch.setattr(prompt_calls, "start", lambda layers: (started.append(len(layers)), start(layers))[1])
    driver.engine.submit(generate(1, prompt=prompt, max_tokens=5))
    each = []
    while driver.engine.stats().rows < 2:
        del started[:]
        driver.engine.step()
        each.append(sum(started))
    assert each == [*([0, 2, 1] * 3)[: steps - 1], 0]
    driver.drain()
    assert driver.answers[1].text == alone


class OneLayer(Pacing):
    """As slow as can be."""

    def layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        return 1


class Told(Pacing):
    """Remembers how many prompts calls were of."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[float] = []

    def begun(self, tokens: int, layers: int, prompts: float) -> None:
        self.prompts.append(prompts)
        super().begun(tokens, layers, prompts)


def test_pacing_is_told_of_prompts_and_parts_of_long_ones(llama: LoadedModel) -> None:
    driver = Driver(llama, prefill_step_size=16)
    driver.engine._prefiller.pacing = told = Told()
    driver.run([generate(i, prompt=PROMPT[:6], max_tokens=2) for i in range(3)])
    assert told.prompts == [3]
    driver.run([generate(9, prompt=(5 * PROMPT)[:41], max_tokens=2)])
    assert told.prompts[1:] == [16 / 40, 16 / 40, 8 / 40]


def paced(loaded: LoadedModel, **limits: Any) -> Driver:
    driver = Driver(loaded, **limits)
    driver.engine._prefiller.pacing = OneLayer()
    return driver


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2", "qwen3_moe"])
@pytest.mark.parametrize("chunk", [512, 16])
def test_running_rows_go_on_between_layers_and_all_say_the_same(
    model_folder: ModelFolder, model_type: str, chunk: int
) -> None:
    loaded = load(model_folder(model_type))
    alone = [Driver(loaded).one(prompt=PROMPT[i:], max_tokens=60 - 20 * i, seed=3).text for i in range(3)]
    driver = paced(loaded, prefill_step_size=chunk)
    driver.engine.submit(generate(0, prompt=PROMPT, max_tokens=60, seed=3))
    while driver.engine.stats().rows < 1:
        driver.engine.step()
    del driver.frames[:]
    for i in (1, 2):
        driver.engine.submit(generate(i, prompt=PROMPT[i:], max_tokens=60 - 20 * i, seed=3))
    driver.drain()
    assert [driver.answers[i].text for i in range(3)] == alone
    before = 0
    for frame in driver.frames:
        deltas = frame.deltas if isinstance(frame, Step) else []
        if any(delta.id for delta in deltas):
            break
        before += len(deltas)
    assert before >= loaded.layout.leaves - 1, "a token of the running row for each layer"


def test_cancelled_between_layers(llama: LoadedModel) -> None:
    driver = paced(llama)
    text = Driver(llama).one(prompt=PROMPT, max_tokens=30).text
    driver.engine.submit(generate(0, prompt=PROMPT, max_tokens=30))
    while driver.engine.stats().rows < 1:
        driver.engine.step()
    for i in (1, 2, 3):
        driver.engine.submit(generate(i, prompt=PROMPT[i:], max_tokens=30))
    driver.engine.step()
    assert driver.engine._prefiller._running is not None
    driver.engine.cancel(2)
    driver.drain()
    assert driver.answers[0].text == text
    assert [driver.answers[i].text for i in (1, 3)] == [
        Driver(llama).one(prompt=PROMPT[i:], max_tokens=30).text for i in (1, 3)
    ]
    assert 2 not in driver.answers
    assert driver.engine.stats().cancelled_total == 1


def test_all_cancelled_between_layers(llama: LoadedModel) -> None:
    driver = paced(llama)
    driver.engine.submit(generate(0, prompt=PROMPT, max_tokens=5))
    driver.engine.step()
    assert driver.engine._prefiller._running is not None
    driver.engine.cancel_all()
    driver.engine.step()
    assert driver.engine._prefiller._running is None
    assert driver.engine._prefiller.pacing._call is None, "steps to come are not its"
    assert not driver.engine.busy
    assert driver.one(prompt=PROMPT, max_tokens=30).text == Driver(llama).one(prompt=PROMPT, max_tokens=30).text


def test_the_engine_learns(llama: LoadedModel) -> None:
    driver = Driver(llama, max_rows=Limits().max_rows)
    driver.engine.submit(generate(0, prompt=PROMPT, max_tokens=60))
    for _ in range(20):
        driver.engine.step()
    pacing = driver.engine._prefiller.pacing
    assert pacing.step is not None
    assert pacing.step > 0
    assert pacing.layers(64, 1000, 1, 1) == 1000
    driver.run([generate(i, prompt=PROMPT, max_tokens=4) for i in (1, 2)])
    assert pacing._costs
