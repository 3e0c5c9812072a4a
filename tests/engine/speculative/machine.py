"""A machine in virtual time that decodes with a draft: what it takes is made up, who decides is the real thing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.policy import Acceptance, expected_tokens, lengths
from runner.engine.speculative.speculation import Speculation

PROMPT = 50
ANSWERS = (100, 300)
"""Tokens of each request: some number in between, so that rows do not end together in plain steps either."""

READS = 4096
"""Tokens that a draft reads at most, before it proposes the first: see Proposer."""

BUILT = 3
"""Calls of a shape until its graph is kept."""


@dataclass
class Machine:
    """Seconds of model calls by their tokens, what a round takes beyond its calls, and what loading made of it all.

    `scatter` is a share of a step's time, at most. The first calls of a shape take `first` times as long. Predictions
    are wrong by a factor, those for the draft by another, and know nothing of calls of more than 64 tokens. One that is
    not `ahead` holds up whoever starts a step; its rounds are each read before the next step is started, and so is what
    is before a round. `host` is the share of a step's time that the host takes to start it. `reading` is what the draft
    takes to read so many tokens, if that is another thing than its calls. Requests ask for some of `answers` tokens.
    """

    target: Callable[[int], float]
    draft: Callable[[int], float]
    overhead: Callable[[int], float] = lambda rows: 0.0
    scatter: float = 0.0
    first: float = 1.0
    target_error: float = 1.0
    draft_error: float = 1.0
    ahead: bool = True
    host: float = 0.1
    reading: Callable[[int], float] | None = None
    answers: tuple[int, int] = ANSWERS

    def costs(self) -> Costs:
        """As predicted."""
        sizes = (1, 8, 32, 40, 64)
        return Costs(
            Curve({tokens: self.target_error * self.target(tokens) for tokens in sizes}),
            Curve({tokens: self.draft_error * self.draft(tokens) for tokens in sizes}),
            None if self.reading is None else Curve({tokens: self.reading(tokens) for tokens in (32, 512, 2048)}),
        )

    def step(self, rows: int, length: int) -> float:
        """As it is."""
        seconds = self.target(rows * (length + 1))
        if length:
            seconds += self.draft(2 * rows) + (length - 1) * self.draft(rows) + self.overhead(rows)
        return seconds

    def best(self, rows: int, rate: float, most: int = 4) -> float:
        """The speed of the best of the numbers of proposals that are considered, in units of plain decoding."""
        plain = self.step(rows, 0)
        return max(expected_tokens(rate, n) * plain / self.step(rows, n) for n in (0, *lengths(most)))


@dataclass
class Sequences:
    """The rows of a batch, in turns of some steps, and how good the draft is for them at each step."""

    sizes: Iterable[tuple[int, int]]
    rate: Callable[[int], float]

    @classmethod
    def of(cls, rows: int, rate: float) -> Sequences:
        """One size all the time."""
        return cls([(rows, 1)], lambda _: rate)


@dataclass
class Outcome:
    """What was decided how often, by rows; and by each step's end, seconds of decoding, and those of plain steps alone
    that give each batch as many tokens."""

    points: list[tuple[float, float]] = field(default_factory=list)
    lengths: Counter[tuple[int, int]] = field(default_factory=Counter)
    policy: Any = None
    tokens: int = 0
    seconds: float = 0.0
    """Of all rows, and of everything: what others did as well."""

    def speed(self, since: float = 0.0) -> float:
        """In units of plain steps that are never disturbed, after a share of the steps."""
        plain, seconds = self.points[int(since * (len(self.points) - 1))]
        return (self.points[-1][0] - plain) / (self.points[-1][1] - seconds)


class _Reader:
    """A proposer that counts what it has not read."""

    def __init__(self) -> None:
        self.behind = 0

    def add(self, tokens: int) -> None:
        self.behind = min(self.behind + tokens, READS)

    def missed(self, rows: Sequence[Any]) -> int:
        return self.behind

    def catch_up(self, rows: Sequence[Any]) -> None:
        self.behind = 0


class _Run:
    def __init__(self, machine: Machine, most: int, seed: int) -> None:
        self.machine, self.most, self.dice = machine, most, random.Random(seed)
        self.answers = random.Random(seed)
        self.now = self.free = 0.0
        self.reader: Any = _Reader()
        self.speculation = Speculation(self.reader, machine.costs(), clock=lambda: self.now)
        self.rows: list[Any] = []
        self.calls: Counter[tuple[int, int]] = Counter()
        self.flying: tuple[list[Any], int, list[int], float] | None = None
        self.others = self.plain = 0.0
        self.outcome = Outcome(policy=self.speculation.policy)

    def resize(self, count: int) -> bool:
        """Rows that have ended go, new ones come with a prompt. Returns whether the batch is another one."""
        stay = [row for row in self.rows if row.left > 0][:count]
        new = [self.joined() for _ in range(count - len(stay))]
        changed = len(stay) < len(self.rows) or bool(new)
        if changed:
            self.settle()
            gone = len(self.rows) - len(stay)
            self.speculation.disturbed(under_way=self.flying is not None, rows=gone, tokens=PROMPT * len(new))
            self.work(0.2 * self.machine.target(1))
        self.rows = stay + new
        if new:
            self.work(self.machine.target(PROMPT * len(new)))
            self.reader.add(PROMPT * len(new))
            self.speculation.joined(new, under_way=self.flying is not None, first=not stay)
        return changed

    def work(self, seconds: float) -> None:
        """The device does something that is no decoding."""
        self.free = max(self.now, self.free) + seconds
        self.others += seconds

    def joined(self) -> Any:
        return SimpleNamespace(
            acceptance=Acceptance(),
            adapter_key="",
            prompt=[1, 2],
            generated=[],
            unread=False,
            left=self.answers.randint(*self.machine.answers),
        )

    def step(self, rate: float, *, changed: bool) -> None:
        rows = self.rows
        if not self.machine.ahead:
            self.settle()
        length = self.speculation.decide(rows, self.most, changed=changed)
        if length and not self.machine.ahead:
            self.read(None)
        self.outcome.lengths[len(rows), length] += 1
        seconds = self.machine.step(len(rows), length) * (1 + self.machine.scatter * self.dice.random())
        if length and self.reader.behind:
            self.settle()
            self.free = max(self.now, self.free) + (self.machine.reading or self.machine.draft)(self.reader.behind)
            self.speculation.catch_up(rows, under_way=self.flying is not None)
        self.calls[len(rows), length] += 1
        if self.machine.first > 1 and self.calls[len(rows), length] <= BUILT:
            building = (self.machine.first - 1) * seconds
            self.now += building
            self.speculation.built(building, under_way=self.flying is not None)
        self.now += self.machine.host * seconds
        if self.machine.ahead:
            self.free = max(self.now, self.free) + seconds
        else:
            self.free = self.now = max(self.now, self.free) + (1 - self.machine.host) * seconds
        kept = [next((n for n in range(length) if self.dice.random() >= rate), length) for _ in rows]
        before, self.flying = self.flying, (rows, length, kept, self.free)
        self.ended(before, length)
        if not length:
            self.reader.add(len(rows))

    def settle(self) -> None:
        """Read the step under way, if it is a round: until then nobody knows how long rows are."""
        if self.flying is not None and self.flying[1]:
            self.read(None)

    def read(self, following: int | None) -> None:
        before, self.flying = self.flying, None
        self.ended(before, following)

    def ended(self, step: tuple[list[Any], int, list[int], float] | None, following: int | None) -> None:
        if step is None:
            return
        rows, length, kept, done = step
        count = len(rows)
        self.now = max(self.now, done)
        for row, more in zip(rows, kept, strict=True):
            row.left -= more + 1
            if length:
                self.speculation.learn(row, more, length)
        said = sum(kept) + count
        self.plain += said / count * self.machine.step(count, 0)
        self.speculation.ended(count, length, said / count, following)
        self.outcome.points.append((self.plain, self.now - self.others))
        self.outcome.tokens, self.outcome.seconds = self.outcome.tokens + said, self.now


def simulate(machine: Machine, sequences: Sequences, *, steps: int = 2000, most: int = 4, seed: int = 1) -> Outcome:
    """So many steps, each row followed by another one of its kind."""
    run = _Run(machine, most, seed)
    turns = chain.from_iterable(repeat(rows, turn) for _ in repeat(None) for rows, turn in sequences.sizes)
    for number, count in zip(range(steps), turns, strict=False):
        run.step(sequences.rate(number), changed=run.resize(count))
    run.read(None)
    return run.outcome


def gain(machine: Machine, sequences: Sequences, *, since: float = 0.0, **options: Any) -> tuple[float, Outcome]:
    """How many times as fast decoding is with a draft, after a share of the steps."""
    outcome = simulate(machine, sequences, **options)
    plain = simulate(machine, sequences, **{**options, "most": 0})
    return outcome.speed(since) / plain.speed(since), outcome


def whole_gain(machine: Machine, sequences: Sequences, **options: Any) -> tuple[float, Outcome]:
    """How many times as many tokens come in a second, prompts and all the rest included."""
    outcome = simulate(machine, sequences, **options)
    plain = simulate(machine, sequences, **{**options, "most": 0})
    return outcome.tokens / outcome.seconds / (plain.tokens / plain.seconds), outcome
