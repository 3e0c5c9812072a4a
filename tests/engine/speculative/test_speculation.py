"""Which steps are timed, and what else is known of the time that went by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.engine.kv import attention_kernel
from runner.engine.loader import load
from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.policy import Taken
from runner.engine.speculative.speculation import Speculation
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import separately
from tests.engine.speculative.drafts import SLACK, always, draft_folder, speculating
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox jumps over")


class Reader:
    """A proposer that has missed ten tokens."""

    def missed(self, rows: Any) -> int:
        return 10

    def catch_up(self, rows: Any) -> None:
        pass


class Timed:
    """Speculation in virtual time, whose policy keeps what it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.taken: list[Taken] = []
        reader: Any = Reader()
        costs = Costs(Curve({1: 1.0}), Curve({10: 7.0}))
        self.speculation = Speculation(reader, costs, clock=lambda: self.now)
        policy: Any = self
        self.speculation.policy = policy

    def took(self, step: Taken) -> None:
        self.taken.append(step)

    def steps(self, *lengths: int) -> list[bool]:
        """A second each, of two rows; returns which were timed. The last one has nothing after it."""
        first = len(self.taken)
        for length, following in zip(lengths, [*lengths[1:], None], strict=True):
            self.now += 1.0
            self.speculation.ended(2, length, 1.0, following)
        return [step.timed for step in self.taken[first:]]


def test_a_step_is_timed_where_one_of_its_kind_follows() -> None:
    timed = Timed()
    assert timed.steps(0, 0, 0, 4, 4, 4, 4, 2) == [True, True, False, True, True, True, False, False]
    assert [step.seconds for step in timed.taken] == [1.0] * 8
    assert [step.following for step in timed.taken] == [0, 0, 4, 4, 4, 4, 2, None]


def test_rounds_that_are_each_read_before_the_next_are_timed_by_themselves() -> None:
    timed = Timed()
    alone = [timed.steps(length) for length in (0, 4, 4, 0)]
    assert alone == [[False], [True], [True], [False]]
    assert [step.alone for step in timed.taken] == [False, True, True, True]
    assert timed.steps(0, 0, 0) == [False, True, False], "the first has waited for nothing before it"
    assert timed.taken[1].for_length == 4
    assert timed.taken[4].for_length == 0


@pytest.mark.parametrize("under_way", [False, True])
def test_what_others_do_concerns_the_next_step_and_the_one_under_way(under_way: bool) -> None:
    timed = Timed()
    timed.steps(0, 0)
    timed.speculation.disturbed(under_way=under_way)
    timed.speculation.disturbed(under_way=False)
    assert timed.steps(0, 0, 0, 0) == [False, not under_way, True, False]
    assert [step.shared for step in timed.taken[2:]] == [True, under_way, False, False]


@pytest.mark.parametrize("under_way", [False, True])
def test_what_is_built_or_read_concerns_as_many_and_is_told_once(under_way: bool) -> None:
    timed = Timed()
    timed.steps(4, 4)
    timed.speculation.built(0.5, under_way=under_way)
    timed.speculation.catch_up([], under_way=False)
    assert timed.steps(4, 4, 4, 4) == [False, not under_way, True, False]
    assert not any(step.shared for step in timed.taken)
    assert [(step.reading, step.building) for step in timed.taken[2:]] == [(7.0, 0.5), *[(0.0, 0.0)] * 3]


def test_new_rows_are_somebody_elses_work() -> None:
    timed = Timed()
    timed.speculation.joined([], under_way=True)
    assert timed.steps(0, 0, 0, 0) == [False, False, True, False]


def watched(speculation: Speculation, proposals: int) -> list[Taken]:
    """Always so many proposals from here on; the list gets the steps that the policy is told of."""
    policy: Any = always(proposals)
    taken: list[Taken] = []
    policy.took = taken.append
    speculation.policy = policy
    return taken


@pytest.mark.parametrize("proposals", [0, 3])
def test_steps_that_build_graphs_are_not_timed(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proposals: int
) -> None:
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    folder = model_folder("llama")
    speculation = speculating(load(folder, slack=SLACK), draft_folder(folder, tmp_path / "draft", "self"))
    taken = watched(speculation, proposals)
    driver = Driver(load(folder, slack=SLACK), speculation=speculation, num_draft_tokens=3)
    driver.run([generate(0, prompt=PROMPT, max_tokens=40)])
    built = [i for i, step in enumerate(taken) if step.building]
    # Two calls of the shape are built, and the third builds what is kept; the test's environment builds each time.
    assert built[:2] == [0, 1]
    assert all(not taken[i].timed and not taken[i + 1].timed for i in built[:-1])


def test_what_rows_are_given_is_counted_by_their_number(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    target = load(folder, slack=SLACK)
    speculation = speculating(target, draft_folder(folder, tmp_path / "draft", "self"))
    taken = watched(speculation, 4)
    driver = Driver(target, speculation=speculation, num_draft_tokens=4)
    driver.run([generate(i, prompt=PROMPT, max_tokens=12) for i in range(2)])
    assert [(step.rows, step.length, step.tokens) for step in taken[:3]] == [(2, 4, 5.0), (2, 4, 5.0), (2, 4, 2.0)]


def test_what_others_do_is_counted(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    target = load(folder, slack=SLACK)
    speculation = speculating(target, draft_folder(folder, tmp_path / "draft", "self"))
    taken = watched(speculation, 0)
    driver = Driver(target, speculation=speculation, num_draft_tokens=4, max_rows=2, prefill_step_size=8)
    driver.run([generate(i, prompt=(3 * PROMPT)[: 12 + i], max_tokens=20 + 10 * i) for i in range(3)])
    assert sum(step.work.tokens for step in taken) == sum(11 + i for i in range(3))
    assert sum(step.work.rows for step in taken) == 3 + 3, "all have come and left"
    assert all(step.shared for step in taken if step.work.rows or step.work.tokens)
    del taken[:]
    driver.run([generate(7, prompt=PROMPT, max_tokens=4)])
    assert len(taken) > 1
    assert [step.idle for step in taken] == [True] + [False] * (len(taken) - 1)
