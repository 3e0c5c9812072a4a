"""What a draft model gains, and never costs: tokens a second with and without it, at several batch sizes.

    python tests/bench/speculation.py [TARGET] [DRAFT] [--rows 1 2 4 8 16 32] [--tokens N] [--draft-tokens 4]
    python tests/bench/speculation.py --geometry llama-1b [--draft-layers 1] [--agreement 0.7] …

Without folders, demo-draft drafts for demo-chat, or, with a geometry, a pair of random weights for itself that agrees
by construction (`pair.py`). Requests are chats that the demo model answers at length; all arrive together, twice as
many as there are rows, and ask for different lengths: rows that all end at once would share the prompts' calls, which
is a gain that a draft takes away by ending them apart. With and without the draft are measured in turns on the same
weights, in one process, after runs of each that do not count, until no graph is built any more; shown are medians, and
the median of the ratios of neighbouring runs; the same of what a row gets from its first token on, which leaves out the
prompts, that a draft has to read as well. One engine with a draft serves all runs of a batch size, as it would in
use: what it has learned stays learned. What it knows by then of steps' costs is printed as well: milliseconds of a
plain step and of rounds with k proposals, as predicted and as timed, how many were timed, and how many there were.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine import cuda_kernels  # noqa: E402
from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loader import LoadedModel, load  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.engine.speculative.costs import size_class  # noqa: E402
from runner.engine.speculative.loading import load_draft, refusal, slack_for, start_speculation  # noqa: E402
from runner.engine.speculative.speculation import Speculation  # noqa: E402
from runner.protocol import FromEngine, Generate, Sampling, Stats, Step  # noqa: E402
from tests.bench.geometry import GEOMETRIES  # noqa: E402
from tests.bench.pair import build_pair  # noqa: E402
from tests.bench.record import Budget, Record, add_options, progress  # noqa: E402

_WARM = 4
"""Runs before those that count, at most."""

MODELS = ROOT / "examples" / "models"
QUESTIONS = (
    "Count from {} to {}.",
    "Repeat after me: the river runs past {} mills and {} bridges on its way down to the sea",
    "What is {} + {}?",
    "Is {} larger than {}?",
)


class Run:
    """One engine."""

    def __init__(self, loaded: LoadedModel, rows: int, draft_tokens: int, speculation: Speculation | None) -> None:
        self._tokens = 0
        self._seen: dict[int, list[tuple[float, int]]] = {}
        self._speculation = speculation
        self._engine = Engine(
            loaded, Limits(max_rows=rows, num_draft_tokens=draft_tokens), self._count, speculation=speculation
        )
        if reason := self._engine.rehearse():
            sys.exit(reason)
        self._rows = rows

    def _count(self, frame: FromEngine) -> None:
        if isinstance(frame, Step):
            now = time.perf_counter()
            for delta in frame.deltas:
                self._tokens += delta.tokens
                self._seen.setdefault(delta.id, []).append((now, delta.tokens))

    def rate(self, tokens: int, sampling: Sampling) -> tuple[float, float]:
        """Tokens a second of requests that arrive together, two for each row; and those of one from its first on."""
        self._tokens, self._seen = 0, {}
        started = time.perf_counter()
        for i in range(2 * self._rows):
            question = QUESTIONS[i % len(QUESTIONS)].format(10 + i, 40 + 2 * i)
            messages = [{"role": "user", "content": question}]
            length = max(1, tokens // 2 + tokens * (7 * i % (2 * self._rows)) // (4 * self._rows))
            self._engine.submit(Generate(id=i, messages=messages, max_tokens=length, sampling=sampling))
        while self._engine.busy:
            self._engine.step()
        rate = self._tokens / (time.perf_counter() - started)
        seconds = sum(seen[-1][0] - seen[0][0] for seen in self._seen.values())
        return rate, (self._tokens - sum(seen[0][1] for seen in self._seen.values())) / seconds

    def warm(self, tokens: int, sampling: Sampling) -> None:
        """Runs until one builds no graph."""
        for _ in range(_WARM):
            before = self.building
            self.rate(tokens, sampling)
            if self.building == before:
                break

    @property
    def building(self) -> float:
        """Seconds of building graphs so far."""
        return self._engine._batch.building

    def costs(self) -> dict[str, Any]:
        """Of steps of all rows: milliseconds by the number of proposals, and how many there were; trials; building."""
        assert self._speculation is not None
        policy, rows = self._speculation.policy, self._rows
        costs, size = policy.costs, size_class(rows)
        steps = {}
        for length in sorted({length for kind, length in policy.steps if kind == size}):
            parts = {"target": costs.verifying(rows, length), "draft": costs.proposing(rows, length)}
            found = {f"predicted, {part}": 1e3 * seconds for part, seconds in parts.items()}
            timed = costs.timed[size, length]
            found["expected"] = 1e3 * costs.predicted(rows, length)
            found |= {"timed": timed, "of": policy.steps[size, length]}
            if timed:
                found["taken"] = 1e3 * costs.step(rows, length)
            elif costs.known(rows, length):
                found["among others"] = 1e3 * costs.step(rows, length)
            steps[length] = found
        return {"rows": rows, "steps": steps, "trials": policy.tried, "building": self.building}

    @property
    def stats(self) -> Stats:
        return self._engine.stats()


def main() -> None:
    """Parse, measure, print."""
    arguments = options()
    cuda_kernels.settle()
    budget = Budget(arguments.budget)
    slack = slack_for(arguments.draft_tokens)
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    if arguments.geometry:
        with tempfile.TemporaryDirectory() as scratch:
            target, draft, made = build_pair(
                Path(scratch), arguments.geometry, layers=arguments.draft_layers, agreement=arguments.agreement
            )
        title = f"the first {arguments.draft_layers} layers of a random {arguments.geometry} for the whole of it"
    else:
        target, made = load(arguments.target, slack=slack), {}
        draft = load_draft(arguments.draft, target, slack)
        title = f"{arguments.draft.name} for {arguments.target.name}"
    if reason := refusal(target, draft):
        sys.exit(reason)
    progress(f"{title}, on {mx.default_device()}, {target.dtype}; {made or 'trained'}")
    name = "sampled" if arguments.temperature else "speculation"
    record = Record(arguments.record, name, f"speculation at temperature {arguments.temperature:g}: {title}")
    record.note("pair", made)
    for rows in arguments.rows:
        if budget.over:
            record.left_out(f"{rows} rows")
            continue
        measure(target, lambda: start_speculation(target, draft, slack), rows, arguments, sampling, record, budget)
    record.finish()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=MODELS / "demo-chat")
    parser.add_argument("draft", nargs="?", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="a pair of random weights, in place of folders")
    parser.add_argument("--draft-layers", type=int, default=1, help="of such a pair: layers that the draft has")
    parser.add_argument("--agreement", type=float, default=0.7, help="of such a pair: how often it agrees")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, help="at most, for each request; 384 on a GPU, or else 96")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=7)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.tokens is None:
        arguments.tokens = 96 if mx.default_device() == mx.Device(mx.cpu) else 384
    return arguments


def measure(
    target: LoadedModel,
    speculation: Callable[[], Speculation],
    rows: int,
    arguments: argparse.Namespace,
    sampling: Sampling,
    record: Record,
    budget: Budget,
) -> None:
    """One row of the table."""
    plain = Run(target, rows, 0, None)
    draft = Run(target, rows, arguments.draft_tokens, speculation())
    plain.warm(arguments.tokens, sampling)
    draft.warm(arguments.tokens, sampling)
    progress(f"{rows} rows: warm")
    pairs = []
    while len(pairs) < arguments.repeat and not (pairs and budget.over):
        pairs.append((plain.rate(arguments.tokens, sampling), draft.rate(arguments.tokens, sampling)))
    ratio, alone = (statistics.median(b[which] / a[which] for a, b in pairs) for which in (0, 1))
    stats = draft.stats
    drafted = stats.drafted_tokens_total / max(1, stats.completion_tokens_total)
    accepted = stats.accepted_tokens_total / max(1, stats.drafted_tokens_total)
    without, with_ = (statistics.median(rate for rate, _ in column) for column in zip(*pairs, strict=True))
    row = {"rows": str(rows), "plain, tokens/s": f"{without:,.0f}", "with the draft": f"{with_:,.0f}"}
    row |= {
        "ratio": f"{ratio:.2f}",
        "from the first token on": f"{alone:.2f}",
        "drafted a token": f"{drafted:.2f}",
        "accepted": f"{accepted:.2f}",
    }
    figures: dict[str, Any] = {"rows": rows, "pairs": pairs, "ratio": ratio, "alone": alone}
    record.row(row, {**figures, "drafted": drafted, "accepted": accepted})
    costs = draft.costs()
    record.note("costs", costs)
    for length, found in costs["steps"].items():
        taken = next((f"{found[kind]:.2f}" for kind in ("taken", "among others") if kind in found), "unknown")
        parts = f"target {found['predicted, target']:.2f}, draft {found['predicted, draft']:.2f}"
        parts += f", with rehearsals {found['expected']:.2f}"
        progress(f"k = {length}: predicted {parts}; {taken} ms in {found['timed']} timed of {found['of']} steps")
    progress(f"{costs['trials']} trials; {costs['building']:.2f} s of building graphs")


if __name__ == "__main__":
    main()
