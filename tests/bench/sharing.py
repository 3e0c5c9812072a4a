"""What it brings that prompts share model calls, wait for each other, and are started a few layers a step: a closed
loop, reckoned, not run.

    python tests/bench/sharing.py [--clients 8 16 32 64 128 512] [--prompt 256] [--answer 128] [--spread 0.5]
        [--chunk 512] [--max-rows 512] [--seconds 20] [--cpu]

The costs are those of one H100 with the geometry of Llama-3.2-1B (milliseconds, below): `runner/engine/sharing.py` has
its constants from here; with `--cpu`, of the demo model on two cores, where a prompt costs what its tokens cost. Each
client sends its next request a few milliseconds after its answer has ended. Lengths vary by `spread` of their mean,
both ways. How many layers a step has, the engine's own `Pacing` says, from the times reckoned here.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine.pacing import Pacing  # noqa: E402
from runner.engine.sharing import AT_ONCE, TOGETHER, Sharing  # noqa: E402


@dataclass(frozen=True)
class Costs:
    """Milliseconds: of a decode step and each row of it; of a call of prompts and each token of it, padding included;
    of rows that join, or leave, however many together; of keeping what a row has computed. `client` is from an answer's
    end to the next request, on average."""

    step: float = 2.5
    row: float = 0.020
    call: float = 5.5
    token: float = 0.005
    join: float = 0.45
    leave: float = 0.45
    keep: float = 0.30
    client: float = 3.0
    layers: int = 16


H100: Final = Costs()
CPU: Final = Costs(step=3.5, row=0.65, call=5.0, token=0.9, join=0.1, leave=0.1, keep=0.1, layers=6)


@dataclass(frozen=True)
class Load:
    """Who asks, and for what."""

    clients: int
    prompt: int = 256
    answer: int = 128
    spread: float = 0.5
    chunk: int = 512
    max_rows: int = 512
    seconds: float = 20


@dataclass(frozen=True)
class Outcome:
    """`first` are milliseconds to the first token, `between` those of a step with all that it carries, both sorted."""

    tokens_per_second: float
    first: list[float]
    between: list[float]
    together: float


@dataclass
class _Row:
    sent: float
    prompt: int
    left: int
    began: bool = False


@dataclass
class _Call:
    rows: list[_Row]
    tokens: int
    left: int


class Loop:
    """The engine's loop, without the engine. Without `pacing`, a call is started in one step."""

    def __init__(self, load: Load, sharing: Sharing, pacing: Pacing | None = None, costs: Costs = H100) -> None:
        self._load, self._sharing, self._pacing, self._costs = load, sharing, pacing, costs
        self._dice = random.Random(0)
        self._now = 0.0
        self._coming = [self._dice.random() * 2 for _ in range(load.clients)]
        heapq.heapify(self._coming)
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._call: _Call | None = None
        self._held = 0
        self._groups: list[int] = []

    def _around(self, mean: int) -> int:
        return max(2, round(mean * (1 + self._load.spread * self._dice.uniform(-1, 1))))

    def run(self) -> Outcome:
        """Until the time is over; the first tenth does not count."""
        end = self._load.seconds * 1000
        tokens, first, between = 0, [], []
        while self._now < end:
            self._arrive()
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
                    heapq.heappush(self._coming, self._now + self._dice.uniform(0, 2 * self._costs.client))
            if counts:
                tokens += len(self._rows)
                between.append(self._now - began)
        groups = sum(self._groups) / max(1, len(self._groups))
        return Outcome(tokens / (end * 0.9) * 1000, sorted(first), sorted(between), groups)

    def _arrive(self) -> None:
        if not self._rows and not self._waiting and self._call is None:
            self._now = max(self._now, self._coming[0])
        while self._coming and self._coming[0] <= self._now:
            sent = heapq.heappop(self._coming)
            self._waiting.append(_Row(sent, self._around(self._load.prompt), self._around(self._load.answer)))

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
        if not full and self._sharing.holds(decoding, ready, self._held):
            self._held += 1
            return None
        self._held = 0
        longest, count = self._waiting[0].prompt, 1
        while count < ready and max(longest, self._waiting[count].prompt) * (count + 1) <= most:
            longest, count = max(longest, self._waiting[count].prompt), count + 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        self._groups.append(count)
        if self._pacing is not None:
            self._pacing.begun(longest * count, self._costs.layers, count)
        return _Call(group, longest * count, self._costs.layers)


def at(values: list[float], part: float) -> float:
    """The value below which that part of sorted values is."""
    return values[min(len(values) - 1, int(part * len(values)))]


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
    parser.add_argument("--cpu", action="store_true", help="the costs of the demo model on two cores")
    given = parser.parse_args()
    wider = Sharing(TOGETHER.times, TOGETHER.most)
    ways = [("at once", AT_ONCE, False), ("at once, paced", AT_ONCE, True)]
    if not given.cpu:
        ways += [("in wider calls", wider, False), ("and waiting for others", TOGETHER, False)]
        ways += [("all of it, paced", TOGETHER, True)]
    print(
        f"{'clients':>7} {'':<22} {'tokens/s':>8} {'first p50':>9} {'p99':>7} {'step p50':>8} {'p99':>6} {'a call':>6}"
    )
    for clients in given.clients:
        load = Load(clients, given.prompt, given.answer, given.spread, given.chunk, given.max_rows, given.seconds)
        for name, sharing, paced in ways:
            found = Loop(load, sharing, Pacing() if paced else None, CPU if given.cpu else H100).run()
            first = f"{at(found.first, 0.5):>9.1f} {at(found.first, 0.99):>7.1f}"
            between = f"{at(found.between, 0.5):>8.1f} {at(found.between, 0.99):>6.1f}"
            print(f"{clients:>7} {name:<22} {found.tokens_per_second:>8.0f} {first} {between} {found.together:>6.1f}")


if __name__ == "__main__":
    main()
