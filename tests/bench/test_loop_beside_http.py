"""The loop and HTTP are measured after as many rounds of the same requests, in turn."""

from __future__ import annotations

import argparse
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from runner.bench.job import Load, Target
from runner.bench.run import Subject
from tests.bench.record import Budget
from tests.bench.versus_mlx_lm import around, in_turn

HTTP = "http"


class Both:
    """A comparison and a loop; both get faster with each round, HTTP by half as much."""

    def __init__(self) -> None:
        self.options = argparse.Namespace(max_tokens=3, repeat=3, loop_warm=2)
        self.us = Subject(Target(host="127.0.0.1", port=1), Load(words=5), calibrated=True)
        self.asked: list[Any] = []
        self.spreads: list[float] = []

    def requests(self, clients: int) -> int:
        return 2 * clients

    def levels(self, subjects: list[Any], clients: int, budget: Budget, **more: Any) -> list[list[Any]]:
        assert (clients, more) == (4, {"repeat": 1, "warm_up": 0})
        assert [subject.load.words for subject in subjects] == [5]
        self.spreads.append(subjects[0].load.spread)
        self.asked.append(HTTP)
        return [[SimpleNamespace(tokens_per_second=50.0 * len(self.asked))]]

    def ask(self, **question: Any) -> dict[str, float]:
        self.asked.append(question)
        return {"tokens_per_second": 100.0 * len(self.asked)}


def test_both_are_warmed_alike_and_take_turns() -> None:
    both: Any = Both()
    http, alone = in_turn(both, both, 4, 0.5, Budget(None))
    assert [asked == HTTP for asked in both.asked] == [True, False] * 2 + [True, False, False, True, True, False]
    assert http == [50.0 * number for number in (5, 8, 9)]
    assert alone == [100.0 * number for number in (6, 7, 10)]
    questions = [asked for asked in both.asked if asked != HTTP]
    assert {question["requests"] for question in questions} == {8}
    assert {question["spread"] for question in questions} == {*both.spreads} == {0.5}
    starts = sorted(question["first"] for question in questions)
    assert all(later - first >= 8 for first, later in pairwise(starts)), "no prompt comes twice"


def test_it_ends_when_its_time_is_over_with_one_of_each() -> None:
    both: Any = Both()
    assert [len(rates) for rates in in_turn(both, both, 4, 0.0, Budget(0))] == [1, 1]


def test_figures_say_how_far_apart_they_were() -> None:
    assert around([2000.0, 1000.0, 1500.0]) == "1,500 (1,000 to 2,000)"
    assert around([0.5, 0.25], ".3f") == "0.375 (0.250 to 0.500)"
