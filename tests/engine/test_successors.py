"""Requests that follow on answers are waited for, so that they share a call, for as long as they come."""

from __future__ import annotations

import pytest

from runner.engine.loader import LoadedModel
from runner.engine.pacing import Pacing
from runner.engine.sharing import Sharing
from runner.engine.successors import Successors
from runner.protocol import Configure
from tests.engine.drive import Driver, generate
from tests.engine.test_sharing import AtOnce
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox jumps over the lazy dog")
STEPS = 4
FOLLOWED = Sharing(times=4, most=512, steps=STEPS, call=2.0, roomier=4)
STAYING = 6


def ended(rows: int, *, steps: int = STEPS) -> Successors:
    found = Successors(steps)
    found.ended(rows, 0.0)
    return found


def test_as_many_are_expected_as_have_ended_and_not_been_followed() -> None:
    found = ended(3)
    assert found.expected == 3
    found.arrived(0.001)
    found.stepped(0.002)
    assert found.expected == 2
    for _ in range(4):
        found.arrived(0.003)
    assert found.expected == 0


def test_who_has_not_come_after_some_steps_is_not_expected_any_more() -> None:
    found = ended(1)
    for _ in range(STEPS - 1):
        found.stepped(0.001)
    found.ended(1, 0.001)
    assert found.expected == 2
    found.stepped(0.001)
    assert found.expected == 1


def test_nor_is_who_has_not_come_after_some_time_though_nothing_was_computed() -> None:
    found = ended(20)
    found.arrived(1.0)
    found.ended(4, 1.0)
    assert found.expected == 0, "none of 20 was followed"


def test_nobody_is_expected_where_rows_are_not_followed_until_they_are_again() -> None:
    found = Successors(1)
    for number in range(100):
        found.ended(1, 0.0)
        assert found.expected == (number < 3)
        found.stepped(0.0)
    for number in range(10):
        found.ended(1, 0.0)
        assert found.expected == (number > 6)
        found.arrived(0.0)


# ------------------------------------------------------------- in the engine


def after_answers(llama: LoadedModel, answers: int, pacing: Pacing | None = None, **limits: int) -> Driver:
    """An engine in which six rows go on, and some answers have ended in one step."""
    driver = Driver(llama, sharing=FOLLOWED, **limits)
    driver.engine._prefiller.pacing = pacing or AtOnce()
    for i in range(STAYING):
        driver.engine.submit(generate(1000 + i, prompt=PROMPT[:4], max_tokens=400))
    for i in range(answers):
        driver.engine.submit(generate(100 + i, prompt=PROMPT[:5], max_tokens=3))
    while not all(i in driver.answers and driver.answers[i].ends for i in range(100, 100 + answers)):
        driver.engine.step()
    return driver


def joined(driver: Driver, arriving: list[int]) -> list[int]:
    """Rows after each step, before which so many requests came."""
    rows = []
    for step, count in enumerate(arriving):
        for i in range(count):
            driver.engine.submit(generate(10 * step + i, prompt=PROMPT, max_tokens=300))
        driver.engine.step()
        rows.append(driver.engine.stats().rows - STAYING)
    return rows


def test_those_that_follow_on_answers_share_a_call(llama: LoadedModel) -> None:
    assert joined(after_answers(llama, 3), [1, 1, 1, 0]) == [0, 0, 3, 3]


def test_those_that_come_before_the_rows_have_left_are_those(llama: LoadedModel) -> None:
    """As in a loop without HTTP: all are there, and nobody else is waited for."""
    assert joined(after_answers(llama, 3), [3, 0]) == [3, 3]


def test_who_does_not_come_is_waited_for_some_steps(llama: LoadedModel) -> None:
    assert joined(after_answers(llama, 3), [1, 0, 0, 0, 0]) == [0, 0, 0, 1, 1]


def test_waiting_costs_no_more_than_a_call_would(llama: LoadedModel) -> None:
    """Twelve tokens of six rows: with five prompts, two steps."""
    assert joined(after_answers(llama, 6), [5, 0, 0, 0]) == [0, 0, 5, 5]


def test_nobody_waits_for_what_there_is_no_row_for(llama: LoadedModel) -> None:
    driver = after_answers(llama, 3, max_rows=STAYING + 3)
    driver.engine.configure(Configure(max_rows=STAYING + 1))
    assert joined(driver, [1, 0]) == [1, 1]


@pytest.mark.parametrize("cancelled", [False, True])
def test_nobody_waits_where_no_answer_has_ended(llama: LoadedModel, cancelled: bool) -> None:
    driver = after_answers(llama, 0)
    if cancelled:
        for i in range(3):
            driver.engine.submit(generate(100 + i, prompt=PROMPT[:5], max_tokens=300))
        driver.engine.step()
        for i in range(3):
            driver.engine.cancel(100 + i)
        driver.engine.step()
    else:
        driver.engine.step()
    assert joined(driver, [1, 0]) == [1, 1]


def test_nobody_waits_where_nothing_decodes(llama: LoadedModel) -> None:
    driver = Driver(llama, sharing=FOLLOWED)
    driver.run(generate(100 + i, prompt=PROMPT[:5], max_tokens=3) for i in range(3))
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=9))
    driver.engine.step()
    assert driver.engine.stats().rows == 1


def test_clients_that_do_not_return_are_not_waited_for(llama: LoadedModel) -> None:
    driver = after_answers(llama, 5)
    assert joined(driver, [0] * (STEPS + 1)) == [0] * (STEPS + 1)
    for i in range(3):
        driver.engine.submit(generate(200 + i, prompt=PROMPT[:5], max_tokens=3))
    while not all(i in driver.answers and driver.answers[i].ends for i in (200, 201, 202)):
        driver.engine.step()
    assert joined(driver, [1, 0]) == [1, 1]
