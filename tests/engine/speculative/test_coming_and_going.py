"""Batches whose rows come and go in every step, with short answers: hardly a step is like the one before.

What counts there is all the time that goes by, since rounds, the draft's reading and others' prompts are one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.others import Others, Work
from runner.engine.speculative.policy import Acceptance, Policy, Taken
from tests.engine.speculative.machine import Machine, Sequences, whole_gain

H200 = Machine(
    lambda n: 0.00165 + 0.000006 * max(0, n - 64),
    lambda n: 0.00027 + 0.0000006 * max(0, n - 64),
    host=0.3,
    reading=lambda n: 0.003 + 0.000002 * n,
    answers=(20, 40),
)
"""A model of 1B and a draft of two layers, as timed with 64 tokens at most; beyond that nothing is known at loading. A
step of 128 rows takes 2.0 ms, a round with four proposals 6.4 and what comes on top; requests say 30 tokens."""

OVERHEADS = {"little": 0.0, "some": 0.00001, "much": 0.0001}
"""Seconds a row that a round takes beside its calls."""

LEAST = 0.97


@pytest.mark.parametrize("overhead", OVERHEADS)
@pytest.mark.parametrize("rate", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("rows", [4, 16, 64, 128])
def test_never_much_slower_than_plain(rows: int, rate: float, overhead: str) -> None:
    machine = replace(H200, overhead=lambda rows: OVERHEADS[overhead] * rows)
    assert whole_gain(machine, Sequences.of(rows, rate), steps=1500)[0] > LEAST


@pytest.mark.parametrize(("rows", "least"), [(4, 1.5), (16, 1.2), (64, 1.1), (128, 1.05)])
def test_a_draft_that_pays_is_used_though_hardly_a_round_can_be_timed(rows: int, least: float) -> None:
    faster, outcome = whole_gain(H200, Sequences.of(rows, 0.9))
    assert faster > least
    timed, rounds = outcome.policy.costs.timed, sum(n for (_, length), n in outcome.lengths.items() if length)
    if rows >= 64:
        assert sum(n for (_, length), n in timed.items() if length) < 0.02 * rounds


def test_sizes_that_go_up_and_down() -> None:
    sizes = Sequences([(n, 3) for n in (128, 120, 90, 60, 30, 10, 4, 1, 20, 70)], lambda _: 0.7)
    assert whole_gain(H200, sizes, steps=3000)[0] > LEAST


# ------------------------------------------------------------- decisions


def plain_steps(policy: Policy, rows: int, count: int, seconds: float = 0.002) -> None:
    for _ in range(count):
        policy.took(Taken(rows, 0, seconds, 1.0, 0))


def test_rounds_among_others_are_charged_with_what_they_take() -> None:
    policy, work = Policy(H200.costs()), Work(4, 128)
    plain_steps(policy, 128, 8)
    for _ in range(50):
        policy.took(Taken(128, 0, 0.003, 1.0, 0, timed=False, shared=True, work=work))
    before = policy.allowance.seconds
    # Nothing lets expect that a round takes 20 ms; a millisecond of them is the others'.
    policy.took(Taken(128, 4, 0.021, 3.0, 4, timed=False, shared=True, work=work))
    assert before - policy.allowance.seconds == pytest.approx(0.020 - 3 * 0.002, rel=0.05)
    # After a time in which there was nothing to do, nobody knows.
    before = policy.allowance.seconds
    policy.took(Taken(128, 4, 100.0, 3.0, 4, timed=False, shared=True, work=work, idle=True))
    assert abs(before - policy.allowance.seconds) < 0.05


def test_many_rows_are_not_looked_at_in_every_step_where_none_is_proposed() -> None:
    policy, looked = Policy(H200.costs()), 0
    rows = [Acceptance(0.0) for _ in range(128)]

    def missed() -> int:
        nonlocal looked
        looked += 1
        return 4096

    plain_steps(policy, 128, 10)
    policy.allowance.charge(1.0)
    for _ in range(80):
        assert policy.decide(rows, 4, missed, changed=True) == 0
    assert looked == 10
    plain_steps(policy, 64, 10)
    assert policy.decide(rows[:64], 4, missed, changed=True) == 0
    assert looked == 11, "another size is another matter"
    plain_steps(policy, 4, 10)
    for _ in range(5):
        policy.decide(rows[:4], 4, missed, changed=True)
    assert looked == 16, "few are looked at whenever they change"


def test_trials_that_find_nothing_are_ever_farther_apart_though_no_round_is_timed() -> None:
    policy = Policy(H200.costs())
    plain_steps(policy, 128, 10)
    begun, before = [], 0
    for step in range(2000):
        policy.allowance.seconds = 1.0
        length = policy.decide([Acceptance(0.3)] * 128, 4, lambda: 0, changed=True)
        # A round that nothing follows on is not even seen as disturbed.
        policy.took(Taken(128, length, 0.02 if length else 0.002, 1.0, None if length else 0, False, True))
        if policy.tried > before:
            before = policy.tried
            begun.append(step)
    gaps = [later - earlier for earlier, later in pairwise(begun)]
    assert len(gaps) > 3
    assert all(later > 1.5 * earlier for earlier, later in pairwise(gaps))


def test_a_trial_that_the_size_interrupts_is_hardly_a_reason_to_wait_longer() -> None:
    policy = Policy(H200.costs())
    for rows in (4, 16):
        plain_steps(policy, rows, 10)
    begun, before = [], 0
    for step in range(400):
        policy.allowance.seconds = 1.0
        rows = 16 if policy.tried > before else 4
        if policy.tried > before:
            before = policy.tried
            begun.append(step)
        length = policy.decide([Acceptance(0.3)] * rows, 4, lambda: 0, changed=True)
        policy.took(Taken(rows, length, 0.02 if length else 0.002, 1.0, None if length else 0, False, True))
    gaps = [later - earlier for earlier, later in pairwise(begun)]
    assert len(gaps) > 8
    assert all(later < 1.5 * earlier for earlier, later in pairwise(gaps[1:]))


# ------------------------------------------------------------- costs


def test_what_others_take_is_told_apart_by_rows_and_tokens() -> None:
    others = Others()
    assert not others.known
    for number in range(100):
        # It takes its time in the step after the one that begins it.
        work = Work(number % 5, 100 * (number % 3))
        others.learn(work, 0.0)
        others.learn(Work(), 0.0002 * work.rows + 0.00001 * work.tokens)
        others.settled()
    assert others.known
    assert others.seconds(Work(10, 0)) == pytest.approx(0.002, rel=0.3)
    assert others.seconds(Work(0, 1000)) == pytest.approx(0.01, rel=0.3)


def test_what_a_round_has_interrupted_tells_nothing_of_others() -> None:
    others = Others()
    for _ in range(20):
        others.learn(Work(1, 0), 5.0)
        others.dropped()
    assert not others.known
    assert others.seconds(Work(1, 1)) == 0.0


def test_others_never_give_time_back() -> None:
    others = Others()
    for number in range(40):
        others.learn(Work(number % 2, 64), 0.001 - 0.0005 * (number % 2))
        others.settled()
    assert others.seconds(Work(1, 0)) >= 0
    assert others.seconds(Work(0, 64)) == pytest.approx(0.00075, rel=0.4)


def test_rounds_among_others_are_what_counts_where_most_are() -> None:
    costs = Costs(Curve({1: 1.0}), Curve({1: 0.1}))
    for _ in range(3):
        costs.record(1, 4, 3.0)
    assert costs.step(1, 4) == pytest.approx(3.0)
    for number in range(11):
        costs.record_among_others(1, 4, 8.0 + number % 3)
    assert costs.step(1, 4) == pytest.approx(9.0)
    for _ in range(12):
        costs.record(1, 4, 4.0)
    assert costs.step(1, 4) == pytest.approx(4.0), "they are not any more"
    for _ in range(12):
        costs.record_among_others(2, 2, -5.0)
    assert costs.known(2, 2)
    assert costs.step(2, 2) == pytest.approx(0.2 * costs.predicted(2, 2)), "others have taken less than was thought"


def test_rehearsed_steps_are_what_is_expected_of_sizes_in_between() -> None:
    costs = Costs(Curve({1: 1.0}), Curve({1: 0.1}))
    calls = {rows: costs.predicted(rows, 4) for rows in (1, 4, 16, 64)}
    costs.rehearsed(1, 4, 2 * calls[1])
    assert costs.predicted(4, 4) == pytest.approx(2 * calls[4])
    costs.rehearsed(16, 4, 4 * calls[16])
    assert costs.predicted(4, 4) == pytest.approx(3 * calls[4])
    assert costs.predicted(64, 4) == pytest.approx(4 * calls[64])
    assert costs.predicted(4, 0) == 4.0, "other numbers of proposals are other steps"
    assert costs.step(16, 4) == pytest.approx(4 * calls[16])


def test_reading_has_costs_of_its_own() -> None:
    costs = Costs(Curve({1: 1.0}), Curve({1: 0.1, 2: 0.1}), Curve({64: 3.0, 1024: 5.0}))
    assert costs.catching_up(1024) == 5.0
    assert costs.proposing(1, 1) == pytest.approx(0.1)
