"""The decision on machines in virtual time: never much slower than plain decoding, fast where it can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.policy import Acceptance, Policy, Taken, expected_tokens, lengths
from tests.engine.speculative.machine import Machine, Sequences, gain, simulate

CPU = Machine(lambda n: 0.006 + 0.0004 * n, lambda n: 0.0014 + 0.00006 * n)
"""Bound by computing from a few tokens on."""

GPU = Machine(lambda n: 0.0013 if n <= 32 else 0.0028 + 0.00002 * (n - 32), lambda n: 0.00025)
"""Bound by launches, and those of more than 32 tokens are others: 1.6 times as fast with a draft of 0.7 and one row."""

COSTLY = replace(GPU, overhead=lambda rows: 0.0012 if rows > 8 else 0.0)
"""Where a round of 16 rows takes much more than its calls let expect."""

IN_TURN = replace(CPU, ahead=False)
"""As the CPU is: see `rounds_ahead`."""

MACHINES = {"cpu": CPU, "in turn": IN_TURN, "gpu": GPU, "costly": COSTLY}
LEAST = 0.97


def nothing() -> int:
    """What the draft has missed."""
    return 0


# ------------------------------------------------------------- machines


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("rows", [1, 4, 16, 32])
def test_never_much_slower_than_plain_and_near_the_best(machine: str, rate: float, rows: int) -> None:
    faster, _ = gain(MACHINES[machine], Sequences.of(rows, rate))
    assert faster > LEAST
    assert faster > 0.94 * MACHINES[machine].best(rows, rate)


def test_rounds_that_cost_two_and_a_half_steps_cost_next_to_nothing() -> None:
    machine = replace(GPU, target=lambda n: 0.0013, overhead=lambda rows: 0.00095 if rows > 8 else 0.0)
    assert machine.step(16, 4) == pytest.approx(2.5 * machine.step(16, 0))
    faster, outcome = gain(machine, Sequences.of(16, 0.4))
    assert faster > LEAST
    assert outcome.policy.tried > 0, "which had to be found out"


WRONG = {"target": "target_error", "draft": "draft_error"}


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("machine", "rows", "rate"), [("gpu", 1, 0.7), ("costly", 16, 0.7), ("cpu", 32, 0.0)])
def test_wrong_predictions_change_nothing(machine: str, rows: int, rate: float, wrong: str, factor: float) -> None:
    found: Machine = replace(MACHINES[machine], **{WRONG[wrong]: factor})
    faster, _ = gain(found, Sequences.of(rows, rate))
    assert faster > LEAST
    assert faster > 0.95 * found.best(rows, rate)


def test_a_draft_that_pays_is_used_from_the_first_request_on() -> None:
    assert GPU.best(1, 0.7) == pytest.approx(1.6, abs=0.03)
    assert gain(GPU, Sequences.of(1, 0.7), steps=100)[0] > 1.3
    assert gain(GPU, Sequences.of(1, 0.7))[0] > 0.95 * GPU.best(1, 0.7)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("rows", "before", "after"), [(1, 0.1, 0.9), (1, 0.9, 0.1), (16, 0.9, 0.1)])
def test_a_draft_that_becomes_good_or_bad_is_found_out(machine: str, rows: int, before: float, after: float) -> None:
    found = MACHINES[machine]
    faster, outcome = gain(found, Sequences([(rows, 1)], lambda step: before if step < 3000 else after), steps=6000)
    assert faster > LEAST
    assert outcome.speed(0.75) > 0.92 * found.best(rows, after)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("sizes", [[(1, 5), (3, 4), (9, 6), (16, 3)], [(30, 8), (1, 8)], [(4, 2), (5, 2)]])
def test_batches_of_changing_size(machine: str, rate: float, sizes: list[tuple[int, int]]) -> None:
    assert gain(MACHINES[machine], Sequences(sizes, lambda _: rate), steps=2000)[0] > LEAST


def test_what_was_learned_of_a_size_is_there_when_it_comes_back() -> None:
    faster, outcome = gain(COSTLY, Sequences([(16, 8), (1, 8)], lambda _: 0.7), steps=4000)
    assert faster > 1.2
    assert outcome.lengths[1, 4] + outcome.lengths[1, 2] > 0.9 * 2000
    assert outcome.lengths[16, 0] > 0.9 * 2000


@pytest.mark.parametrize(("machine", "rows", "rate"), [("gpu", 1, 0.7), ("costly", 16, 0.7), ("cpu", 4, 0.0)])
def test_first_calls_that_take_twenty_times_as_long_are_saved_up_for(machine: str, rows: int, rate: float) -> None:
    slow = replace(MACHINES[machine], first=20.0)
    for steps in (500, 2000, 8000):
        assert gain(slow, Sequences.of(rows, rate), steps=steps)[0] > LEAST
    assert gain(slow, Sequences.of(rows, rate), steps=40_000, since=0.5)[0] > 0.95 * slow.best(rows, rate)


def test_timings_that_scatter_change_little() -> None:
    for rows, rate in ((1, 0.9), (8, 0.3)):
        noisy = replace(CPU, scatter=0.5)
        assert gain(noisy, Sequences.of(rows, rate))[0] > max(LEAST, 0.93 * CPU.best(rows, rate))


def test_rows_that_accept_carry_one_that_does_not() -> None:
    rows = [Acceptance(rate) for rate in (0.9, 0.9, 0.9, 0.0)]
    policy = Policy(GPU.costs())
    decided = [decide_and_take(policy, rows, GPU) for _ in range(60)]
    assert decided[-1] == 4


# ------------------------------------------------------------- decisions


def decide_and_take(policy: Policy, rows: list[Acceptance], machine: Machine, most: int = 4) -> int:
    """A step that takes and gives what it is expected to."""
    length = policy.decide(rows, most, nothing, changed=False)
    tokens = sum(expected_tokens(row.rate, length) for row in rows) / len(rows)
    policy.took(Taken(len(rows), length, machine.step(len(rows), length), tokens, length))
    return length


def test_only_two_numbers_of_proposals_are_considered() -> None:
    assert [lengths(most) for most in (1, 2, 3, 4, 8)] == [(1,), (2, 1), (3, 1), (4, 2), (8, 4)]
    _, outcome = gain(CPU, Sequences.of(4, 0.6), most=8)
    assert {length for _, length in outcome.lengths} <= {0, 8, 4}


def test_a_plain_step_is_timed_before_anything_is_proposed() -> None:
    policy = Policy(GPU.costs())
    assert [decide_and_take(policy, [Acceptance(1.0)], GPU) for _ in range(8)] == [0, 0, 0, 0, 0, 4, 4, 4]


def test_without_a_draft_or_rows_nothing_is_proposed() -> None:
    policy = Policy(GPU.costs())
    for _ in range(30):
        decide_and_take(policy, [Acceptance(1.0)], GPU)
    assert policy.decide([Acceptance(1.0)], 4, nothing, changed=True) == 4
    assert policy.decide([Acceptance(1.0)], 0, nothing, changed=False) == 0
    assert policy.decide([], 4, nothing, changed=True) == 0


def test_what_is_proposed_stays_within_a_lowered_limit() -> None:
    policy, row = Policy(GPU.costs()), Acceptance(1.0)
    decided = [decide_and_take(policy, [row], GPU, most=8) for _ in range(30)]
    assert decided[-1] == 8
    decided = [decide_and_take(policy, [row], GPU, most=2) for _ in range(30)]
    assert max(decided) == decided[-1] == 2


def test_plain_steps_are_timed_again_now_and_then() -> None:
    policy, row = Policy(GPU.costs()), Acceptance(1.0)
    decided = [decide_and_take(policy, [row], GPU) for _ in range(600)]
    assert 0 < decided[50:].count(0) < 0.04 * 550
    # They have become as fast as nobody thought, and rounds do not pay any more.
    faster = replace(GPU, target=lambda n: 0.0001 if n == 1 else GPU.target(n))
    decided = [decide_and_take(policy, [row], faster) for _ in range(600)]
    assert decided[-100:].count(0) > 90


def test_what_others_do_is_neither_charged_nor_saved_up() -> None:
    policy, plain = Policy(GPU.costs()), GPU.step(1, 0)
    for _ in range(5):
        policy.took(Taken(1, 0, plain, 1.0, 0))
    before = policy.allowance.seconds
    policy.took(Taken(1, 0, 1e6, 1.0, 0, timed=False, shared=True))
    assert 0 < policy.allowance.seconds - before < plain
    # What nothing follows on may have been computed while the one before was waited for.
    for following, shared, seconds in ((4, True, 1e6), (None, False, 1e-6)):
        before = policy.allowance.seconds
        policy.took(Taken(1, 4, seconds, 1.0, following, timed=False, shared=shared))
        assert 0.5 * GPU.step(1, 4) < before - policy.allowance.seconds + plain < 2 * GPU.step(1, 4)


def test_reading_and_building_are_charged_though_others_were_at_work() -> None:
    policy, plain = Policy(GPU.costs()), GPU.step(1, 0)
    for _ in range(5):
        policy.took(Taken(1, 0, plain, 1.0, 0))
    for following, charged in ((0, False), (4, True)):
        before = policy.allowance.seconds
        policy.took(Taken(1, 0, 1e6, 1.0, following, False, True, reading=plain, building=3 * plain))
        assert (before - policy.allowance.seconds > 3.9 * plain) == charged


def test_a_lost_time_is_made_up_for_before_anything_else_is_tried() -> None:
    policy, row = Policy(GPU.costs()), Acceptance(1.0)
    plain = GPU.step(1, 0)
    decided = [decide_and_take(policy, [row], GPU) for _ in range(30)]
    assert decided[-1] == 4
    policy.took(Taken(1, 4, 200 * plain, 5.0, 4, timed=False))
    waited = 0
    while decide_and_take(policy, [row], GPU) == 0:
        waited += 1
    assert 5_000 < waited < 20_000


def test_a_long_gain_does_not_pay_for_a_long_loss() -> None:
    good_then_bad = Sequences([(1, 1)], lambda step: 1.0 if step < 20_000 else 0.0)
    outcome = simulate(GPU, good_then_bad, steps=22_000)
    assert outcome.speed(20 / 22) > 0.95


# ------------------------------------------------------------- parts


@given(st.floats(0, 1), st.integers(1, 16))
def test_expected_tokens_is_the_sum_over_prefixes(rate: float, length: int) -> None:
    assert expected_tokens(rate, length) == pytest.approx(sum(rate**n for n in range(length + 1)))


def test_acceptance_counts_what_was_looked_at() -> None:
    row = Acceptance(prior=0.5)
    for _ in range(200):
        row.add(3, 4)  # three kept, one refused
    assert row.rate == pytest.approx(0.75, abs=0.02)
    for _ in range(100):
        row.add(0, 4)
    assert row.rate < 0.15


def test_curve_goes_through_its_points_and_on() -> None:
    curve = Curve({1: 1.0, 5: 3.0, 9: 2.0})
    assert [curve(1), curve(3), curve(5), curve(9), curve(17)] == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert Curve({1: 1.0, 3: 2.0})(5) == 3.0
    assert Curve({2: 1.0})(4) == 2.0


def test_costs_follow_what_steps_took() -> None:
    costs = Costs(Curve({1: 1.0, 9: 2.0}), Curve({1: 0.1}))
    assert costs.step(1, 4) == costs.predicted(1, 4) == pytest.approx(1.5 + 0.2 + 3 * 0.1)
    assert not costs.known(1, 0)
    for seconds in (2.0, 9.0, 2.0, 2.0, 2.0):
        costs.record(1, 0, seconds)
    assert costs.known(1, 0)
    assert costs.step(1, 0) == 2.0, "one that was disturbed does not count"
    assert costs.average(1) == pytest.approx(17 / 5), "but it does in the long run"
    assert costs.step(1, 4) == pytest.approx(2 * 2.0), "rounds that were not timed are off like plain steps"
    assert costs.step(8, 0) == pytest.approx(2.0 * (1 + 7 / 8)), "contexts are as long in other batches"
    for _ in range(3):
        costs.record(1, 4, 6.0)
    assert costs.step(1, 4) == pytest.approx(6.0)
    assert costs.step(1, 3) == pytest.approx(3 * costs.predicted(1, 3)), "or else like rounds of another length"
    assert costs.step(4, 0) == pytest.approx(2 * costs.predicted(4, 0))
    assert costs.catching_up(0) == 0.0


def test_rounds_that_are_never_timed_cost_what_those_take_that_are_disturbed_least() -> None:
    costs = Costs(Curve({1: 1.0, 9: 2.0}), Curve({1: 0.1}))
    for number in range(12):
        assert not costs.known(1, 4)
        costs.record_disturbed(1, 4, 5.0 + number % 4)
    assert costs.known(1, 4)
    assert costs.step(1, 4) == pytest.approx(5.0)
    for expected in (5.0, 5.0, 3.0):
        costs.record(1, 4, 3.0)
        assert costs.known(1, 4)
        assert costs.step(1, 4) == pytest.approx(expected), "a few that are timed are worth more"


def test_where_rows_come_and_go_at_every_step_rounds_that_do_not_pay_are_given_up() -> None:
    """Nothing is known but what steps took with the work of others."""
    policy = Policy(GPU.costs())
    plain = GPU.step(16, 0)
    for _ in range(5):
        policy.took(Taken(16, 0, plain, 1.0, 0))
    rows, lengths = [Acceptance() for _ in range(16)], []
    for _ in range(1500):
        length = policy.decide(rows, 4, nothing, changed=True)
        # Rounds take eight steps' time, which nothing has let expect.
        policy.took(
            Taken(16, length, (8 if length else 1) * plain + 0.001, 2.0 if length else 1.0, length, False, True)
        )
        lengths.append(length)
    assert policy.costs.known(16, 4)
    assert sum(length > 0 for length in lengths[500:]) < 0.02 * 1000
