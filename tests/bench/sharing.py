"""What it brings that prompts share model calls, wait for each other, and are started a few layers a step: a closed
loop, reckoned, not run.

    python tests/bench/sharing.py [--clients 8 16 32 64 128 512] [--prompt 256] [--answer 128] [--spread 0.5]
        [--chunk 512] [--max-rows 512] [--seconds 20] [--costs h200|h100|cpu] [--rate REQUESTS_A_SECOND]

The costs are those of one H200 with the geometry of Llama-3.2-1B (milliseconds, below), or of one H100, as both were
measured; or of the demo model on two cores, where a prompt costs what its tokens cost. `runner/engine/sharing.py` has
its constants from here. Each client sends its next request a few milliseconds after its answer has ended; "as the loop
alone" at once. With `--rate` nobody waits for an answer: requests come as they like. Lengths vary by `spread` of their
mean, both ways. How many layers a step has, and who is expected, the engine's own `Pacing` and `Successors` say, from
the times reckoned here.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from msgspec import structs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine.pacing import Pacing  # noqa: E402
from runner.engine.sharing import AT_ONCE, TOGETHER, Sharing  # noqa: E402
from runner.engine.successors import Successors  # noqa: E402

GRAPHS: Final = 64
"""Shapes of calls whose graphs are kept."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds: of a decode step and each row of it; of a call of prompts and each token of it, padding included;
    of rows that join, or leave, however many together; of keeping what a row has computed. The first two calls of a
    shape take `build` longer, the third `trace`. From an answer's end to the next request it is as much as `client`
    says, at least and at most."""

    step: float = 1.3
    row: float = 0.0075
    call: float = 2.5
    token: float = 0.0033
    join: float = 0.25
    leave: float = 0.25
    keep: float = 0.05
    build: float = 2.5
    trace: float = 8.0
    client: tuple[float, float] = (1.0, 3.0)
    layers: int = 16


H200: Final = Costs()
H100: Final = Costs(
    *(2.5, 0.020, 5.5, 0.005), join=0.45, leave=0.45, keep=0.30, build=0.0, trace=0.0, client=(0.0, 6.0)
)
CPU: Final = Costs(
    *(3.5, 0.65, 5.0, 0.9), join=0.1, leave=0.1, keep=0.1, build=0.0, trace=0.0, client=(0.0, 6.0), layers=6
)
COSTS: Final = {"h200": H200, "h100": H100, "cpu": CPU}


@dataclass(frozen=True)
class Load:
    """Who asks, and for what. With a `rate` of requests a second, not `clients` that come back."""

    clients: int
    prompt: int = 256
    answer: int = 128
    spread: float = 0.5
    chunk: int = 512
    max_rows: int = 512
    seconds: float = 20
    rate: float = 0


@dataclass(frozen=True)
class Outcome:
    """`first` are milliseconds to the first token, `between` those of a step with all that it carries, both sorted.
    A call had `together` prompts, `building` of all time went by in building graphs, of `shapes` in the end."""

    tokens_per_second: float
    first: list[float]
    between: list[float]
    together: float
    building: float
    shapes: int


@dataclass
class _Row:
    """`before` tokens of a chat template are known of its prompt."""

    sent: float
    prompt: int
    left: int
    before: int
    began: bool = False


@dataclass
class _Call:
    rows: list[_Row]
    tokens: int
    left: int


class Loop:
    """The engine's loop, without the engine. Without `pacing`, a call is started in one step. With `launched` prompts
    attend by launches."""

    def __init__(
        self,
        load: Load,
        sharing: Sharing,
        pacing: Pacing | None = None,
        costs: Costs = H200,
        *,
        launched: bool = True,
    ) -> None:
        self._load, self._sharing, self._pacing, self._costs = load, sharing, pacing, costs
        self._reach = 1 << 20 if launched else 0
        self._dice = random.Random(0)
        self._now = 0.0
        self._coming = [self._dice.random() * 2 for _ in range(1 if load.rate else load.clients)]
        heapq.heapify(self._coming)
        self._successors = Successors(sharing.steps)
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._call: _Call | None = None
        self._held = 0
        self._spent = 0
        self._groups: list[int] = []
        self._seen: Counter[tuple[int, int]] = Counter()
        self._graphs: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._building = 0.0

    def _around(self, mean: int) -> int:
        return max(2, round(mean * (1 + self._load.spread * self._dice.uniform(-1, 1))))

    def run(self) -> Outcome:
        """Until the time is over; the first tenth does not count."""
        end = self._load.seconds * 1000
        tokens, first, between = 0, [], []
        while self._now < end:
            self._arrive()
            self._successors.stepped(self._now / 1e3)
            began, before = self._now, list(self._rows)
            self._leave()
            self._prefill()
            self._now += (self._costs.step + self._costs.row * len(self._rows)) if self._rows else 0.0
            if self._pacing is not None and self._rows:
                self._pacing.stepped((self._now - began) / 1e3, len(self._rows), changed=self._rows != before)
            counts = self._now > end / 10
            for row in self._rows:
                row.left -= 1
                if not row.began and counts:
                    first.append(self._now - row.sent)
                row.began = True
                if not row.left:
                    self._end()
            if counts:
                tokens += len(self._rows)
                between.append(self._now - began)
        groups = sum(self._groups) / max(1, len(self._groups))
        rate, building = tokens / (end * 0.9) * 1000, self._building / self._now
        return Outcome(rate, sorted(first), sorted(between), groups, building, len(self._seen))

    def _end(self) -> None:
        self._successors.ended(1, self._now / 1e3)
        if not self._load.rate:
            heapq.heappush(self._coming, self._now + self._dice.uniform(*self._costs.client))

    def _arrive(self) -> None:
        if not self._rows and not self._waiting and self._call is None:
            self._now = max(self._now, self._coming[0])
        while self._coming and self._coming[0] <= self._now:
            sent = heapq.heappop(self._coming)
            if self._load.rate:
                heapq.heappush(self._coming, sent + self._dice.expovariate(self._load.rate / 1e3))
            self._successors.arrived(self._now / 1e3)
            prompt, answer = self._around(self._load.prompt), self._around(self._load.answer)
            self._waiting.append(_Row(sent, prompt, answer, self._dice.randint(2, 5)))

    def _leave(self) -> None:
        staying = [row for row in self._rows if row.left]
        if ended := len(self._rows) - len(staying):
            self._now += self._costs.keep * ended + (self._costs.leave if staying else 0)
        self._rows = staying

    def _prefill(self) -> None:
        if self._call is None:
            self._call = self._begun()
        call = self._call
        if call is None:
            return
        layers = self._costs.layers
        if self._pacing is not None:
            waiting = len(call.rows) + len(self._waiting)
            layers = self._pacing.layers(call.tokens, layers, len(self._rows), waiting)
        started = min(layers, call.left)
        call.left -= started
        self._now += (self._costs.call + self._costs.token * call.tokens) * started / self._costs.layers
        if call.left:
            return
        self._call = None
        if self._pacing is not None:
            self._pacing.started()
        self._now += self._costs.join if self._rows else 0
        self._rows = self._rows + call.rows

    def _begun(self) -> _Call | None:
        """As Prefiller.due and Prefiller._take have it; no prompt is longer than a chunk."""
        decoding = len(self._rows)
        ready = min(len(self._waiting), self._load.max_rows - decoding)
        if ready <= 0:
            self._held = 0
            return None
        most = self._sharing.tokens(self._load.chunk)
        full = max(row.prompt for row in self._waiting[:ready]) * (ready + 1) > most
        expected = min(self._successors.expected, self._load.max_rows - decoding - ready)
        if not full and self._sharing.holds(decoding, ready, self._held, self._spent, expected):
            self._held += 1
            self._spent += ready
            return None
        self._held = self._spent = 0
        longest, count = self._waiting[0].prompt, 1
        while count < ready and max(longest, self._waiting[count].prompt) * (count + 1) <= most:
            longest, count = max(longest, self._waiting[count].prompt), count + 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        self._groups.append(count)
        width = self._sharing.width(max(row.before for row in group), longest, self._reach)
        if self._pacing is not None:
            self._pacing.begun(width * count, self._costs.layers, count)
        self._build(count, width)
        return _Call(group, width * count, self._costs.layers)

    def _build(self, rows: int, width: int) -> None:
        """As `traced.KeptGraphs` has it."""
        shape, before = (rows, width), self._now
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return
        self._seen[shape] += 1
        if self._seen[shape] <= 2:
            self._now += self._costs.build
        else:
            self._now += self._costs.trace
            self._graphs[shape] = None
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._building += self._now - before


def at(values: list[float], part: float) -> float:
    """The value below which that part of sorted values is."""
    return values[min(len(values) - 1, int(part * len(values)))]


def ways(costs: Costs, *, loop: bool) -> list[tuple[str, Sharing, bool, Costs, bool]]:
    """What to compare: a name, how prompts share calls, whether they are paced, costs, and whether widths are few."""
    alone = AT_ONCE if costs is CPU else Sharing(multiple=TOGETHER.multiple)
    found = [("at once", alone, False, costs, True), ("at once, paced", alone, True, costs, True)]
    if costs is CPU:
        return found
    wider, each_other = structs.replace(TOGETHER, rows=0, steps=0), structs.replace(TOGETHER, call=0.0)
    found += [("in wider calls", wider, False, costs, True), ("waiting for others", each_other, False, costs, True)]
    found += [("all that, paced", each_other, True, costs, True), ("and many widths", each_other, True, costs, False)]
    found += [("and for who follows", TOGETHER, True, costs, True)]
    at_once = replace(costs, client=(0.0, 0.0))
    return [*found, ("the same, loop alone", TOGETHER, True, at_once, True)] if loop else found


def main() -> None:
    """Parse, reckon, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 32, 64, 128, 512])
    parser.add_argument("--prompt", type=int, default=Load.prompt)
    parser.add_argument("--answer", type=int, default=Load.answer)
    parser.add_argument("--spread", type=float, default=Load.spread)
    parser.add_argument("--chunk", type=int, default=Load.chunk)
    parser.add_argument("--max-rows", type=int, default=Load.max_rows)
    parser.add_argument("--seconds", type=float, default=Load.seconds)
    parser.add_argument("--rate", type=float, default=Load.rate, help="requests a second that come as they like")
    parser.add_argument("--costs", choices=COSTS, default="h200")
    given = parser.parse_args()
    print(
        f"{'clients':>7} {'':<20} {'tokens/s':>8} {'first p50':>9} {'p99':>7} {'step p50':>8} {'p99':>6} {'a call':>6}"
        f" {'built':>5}"
    )
    for clients in [0] if given.rate else given.clients:
        load = Load(
            *(clients, given.prompt, given.answer, given.spread, given.chunk, given.max_rows, given.seconds, given.rate)
        )
        for name, sharing, paced, costs, few in ways(COSTS[given.costs], loop=not given.rate):
            found = Loop(load, sharing, Pacing() if paced else None, costs, launched=few).run()
            first = f"{at(found.first, 0.5):>9.1f} {at(found.first, 0.99):>7.1f}"
            between = f"{at(found.between, 0.5):>8.1f} {at(found.between, 0.99):>6.1f}"
            print(
                f"{clients:>7} {name:<20} {found.tokens_per_second:>8.0f} {first} {between} {found.together:>6.1f}"
                f" {found.building:>5.0%}"
            )


if __name__ == "__main__":
    main()
