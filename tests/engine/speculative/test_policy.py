"""The decision against simulated machines: never much slower than plain decoding, fast where it can be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.policy import Acceptance, Policy, expected_tokens


@dataclass
class Machine:
    """Seconds of calls by their tokens, and what of it was measured when the model was loaded."""

    target: Callable[[int], float]
    draft: Callable[[int], float]
    overhead: float = 0.0
    noise: float = 0.0

    def costs(self) -> Costs:
        return Costs(
            Curve({tokens: self.target(tokens) for tokens in (1, 32)}),
            Curve({tokens: self.draft(tokens) for tokens in (1, 32)}),
        )

    def step(self, rows: int, length: int, dice: random.Random) -> float:
        seconds = self.target(rows * (length + 1))
        if length:
            seconds += self.draft(2 * rows) + (length - 1) * self.draft(rows) + self.overhead
        return seconds * (1 + self.noise * dice.random())


CPU = Machine(lambda n: 0.006 + 0.0004 * n, lambda n: 0.0014 + 0.00006 * n)
"""Bound by computing from a few tokens on."""

GPU = Machine(lambda n: 0.003 + (0.00001 * n if n < 64 else 0.00004 * (n - 48)), lambda n: 0.0006)
"""Bound by reading the weights until there are many."""

COSTLY = Machine(lambda n: 0.004 + 0.0001 * n, lambda n: 0.0005, overhead=0.02)
"""Where a round costs much more than its calls let expect."""


def nothing() -> int:
    """What the draft has missed."""
    return 0


@dataclass
class Outcome:
    """`speed` is tokens a second in units of plain decoding; `lengths` is how often each was decided."""

    speed: float
    lengths: dict[int, int]
    policy: Policy


def simulate(machine: Machine, rates: list[float], *, most: int = 4, seconds: float = 8.0, seed: int = 1) -> Outcome:
    """Rows of 200 tokens, each followed by another of its kind."""
    dice = random.Random(seed)
    policy = Policy(machine.costs())
    rows = [Acceptance() for _ in rates]
    left = [200] * len(rates)
    elapsed = produced = plain = 0.0
    lengths: dict[int, int] = {}
    before, changed, read = 0, True, False
    while elapsed < seconds:
        missed = 0 if read else 50 * len(rows)
        length = policy.decide(rows, most, lambda missed=missed: missed, changed=changed)
        if length and not read:
            elapsed += machine.draft(missed)
        read = length > 0
        took = machine.step(len(rows), length, dice)
        policy.took(len(rows), length, took, steady=length == before and not changed)
        elapsed += took
        plain += machine.step(len(rows), 0, dice)
        lengths[length] = lengths.get(length, 0) + 1
        before, changed = length, False
        for i, rate in enumerate(rates):
            kept = next((n for n in range(length) if dice.random() > rate), length)
            if length:
                rows[i].add(kept, length)
            produced += kept + 1
            left[i] -= kept + 1
            if left[i] <= 0:
                rows[i], left[i], changed = Acceptance(rows[i].rate), 200, True
    steps = sum(lengths.values())
    return Outcome((produced / elapsed) / (len(rates) * steps / plain), lengths, policy)


def best(machine: Machine, rates: list[float], most: int = 4) -> float:
    """The speed of the best fixed number of proposals, in units of plain decoding."""
    quiet, count = random.Random(0), len(rates)
    speeds = [
        sum(expected_tokens(rate, length) for rate in rates) / machine.step(count, length, quiet)
        for length in range(most + 1)
    ]
    return max(speeds) / speeds[0]


@pytest.mark.parametrize("machine", [CPU, GPU, COSTLY], ids=["cpu", "gpu", "costly"])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("rows", [1, 4, 8, 32])
def test_never_much_slower_than_plain_and_near_the_best(machine: Machine, rate: float, rows: int) -> None:
    outcome = simulate(machine, [rate] * rows)
    assert outcome.speed > 0.97
    assert outcome.speed > 0.85 * best(machine, [rate] * rows)


def test_one_good_row_in_a_batch_of_bad_ones_does_not_turn_it_on_where_computing_is_the_limit() -> None:
    outcome = simulate(CPU, [0.95] + [0.05] * 15)
    assert outcome.speed > 0.97
    assert outcome.lengths[0] > 0.95 * sum(outcome.lengths.values())


def test_rows_that_accept_carry_one_that_does_not() -> None:
    assert simulate(GPU, [0.9, 0.9, 0.9, 0.0]).speed > 1.5


def test_timings_that_scatter_change_little() -> None:
    noisy = Machine(CPU.target, CPU.draft, noise=0.5)
    assert simulate(noisy, [0.9]).speed > 0.85 * best(CPU, [0.9])
    assert simulate(noisy, [0.3] * 8).speed > 0.95


def test_a_draft_that_becomes_good_is_found_again_at_little_cost() -> None:
    policy = Policy(CPU.costs())
    row = Acceptance(prior=0.0)
    dice = random.Random(5)
    read, found = False, None
    for step in range(20_000):
        missed = 0 if read else 50
        length = policy.decide([row], 4, lambda missed=missed: missed, changed=False)
        policy.took(1, length, CPU.step(1, length, dice), steady=True)
        if length:
            row.add(0 if step < 5_000 else length, length)
        read = length > 0
        if step < 5_000:
            assert length == 0 or policy.tried
        elif length and policy.tried and row.rate > 0.9:
            found = step
            break
    assert found is not None
    assert found < 8_000


def test_a_machine_that_was_busy_when_plain_steps_were_measured_does_not_keep_a_bad_draft_on() -> None:
    policy = Policy(CPU.costs())
    for _ in range(9):
        policy.took(1, 0, 3 * CPU.step(1, 0, random.Random(0)), steady=True)
    row, dice, lengths = Acceptance(), random.Random(3), []
    for _ in range(100):
        length = policy.decide([row], 4, nothing, changed=False)
        policy.took(1, length, CPU.step(1, length, dice), steady=True)
        lengths.append(length)
        if length:
            row.add(0, length)
    assert not any(lengths[50:])


def test_without_a_draft_or_rows_nothing_is_proposed() -> None:
    policy = Policy(CPU.costs())
    assert policy.decide([Acceptance(prior=1.0)], 4, nothing, changed=True) > 0
    assert policy.decide([Acceptance(prior=1.0)], 0, nothing, changed=False) == 0
    assert policy.decide([], 4, nothing, changed=True) == 0


def test_what_is_proposed_stays_within_a_lowered_limit() -> None:
    policy = Policy(CPU.costs())
    row = Acceptance(prior=1.0)
    assert policy.decide([row], 8, nothing, changed=True) > 2
    assert policy.decide([row], 2, nothing, changed=False) <= 2


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
    assert costs.step(1, 4) == pytest.approx(1.0 + 0.5 + 0.2 + 3 * 0.1)
    for _ in range(5):
        costs.record(1, 0, 2.0)
        costs.record(1, 4, 5.6)
    assert costs.step(1, 0) == 2.0
    assert costs.step(1, 4) == pytest.approx(5.6)
    assert costs.step(1, 3) > 5.0, "what was learned of four proposals is applied to three"
    assert costs.step(8, 0) == pytest.approx(2.0 * (1 + 7 / 8)), "contexts are as long in other batches"
    assert costs.catching_up(0) == 0.0
