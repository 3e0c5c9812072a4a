"""What a draft model gains, and never costs: tokens a second with and without it, at several batch sizes.

    python tests/bench/speculation.py [TARGET] [DRAFT] [--rows 1 2 4 8 16 32] [--tokens 96] [--draft-tokens 4]

Without folders, demo-draft drafts for demo-chat. Requests are chats that the demo model answers at length; all arrive
together, twice as many as there are rows. With and without the draft are measured in turns on the same weights, in one
process; shown are medians, and the median of the ratios of neighbouring runs. One engine with a draft serves all runs
of a batch size, as it would in use: what it has learned stays learned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loader import LoadedModel, load  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.engine.speculative.loading import slack_for, speculate  # noqa: E402
from runner.engine.speculative.speculation import Speculation  # noqa: E402
from runner.protocol import FromEngine, Generate, Sampling, Stats, Step  # noqa: E402

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
        self._engine = Engine(
            loaded, Limits(max_rows=rows, num_draft_tokens=draft_tokens), self._count, speculation=speculation
        )
        self._rows = rows

    def _count(self, frame: FromEngine) -> None:
        if isinstance(frame, Step):
            self._tokens += sum(delta.tokens for delta in frame.deltas)

    def rate(self, tokens: int, sampling: Sampling) -> float:
        """Tokens a second of requests that arrive together, two for each row."""
        self._tokens = 0
        started = time.perf_counter()
        for i in range(2 * self._rows):
            question = QUESTIONS[i % len(QUESTIONS)].format(10 + i, 40 + 2 * i)
            messages = [{"role": "user", "content": question}]
            self._engine.submit(Generate(id=i, messages=messages, max_tokens=tokens, sampling=sampling))
        while self._engine.busy:
            self._engine.step()
        return self._tokens / (time.perf_counter() - started)

    @property
    def stats(self) -> Stats:
        return self._engine.stats()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=MODELS / "demo-chat")
    parser.add_argument("draft", nargs="?", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=96, help="at most, for each request")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    slack = slack_for(arguments.draft_tokens)
    loaded = load(arguments.target, slack=slack)
    print(f"{arguments.draft.name} for {arguments.target.name} on {mx.default_device()}, {loaded.dtype}")
    print(f"{'rows':>4} {'plain':>8} {'draft':>8} {'ratio':>6} {'drafted':>8} {'accepted':>8}   tokens/s")
    for rows in arguments.rows:
        measure(loaded, rows, arguments)


def measure(loaded: LoadedModel, rows: int, arguments: argparse.Namespace) -> None:
    """One line."""
    speculation, notes = speculate(arguments.draft, loaded, slack_for(arguments.draft_tokens))
    if speculation is None:
        sys.exit(notes[0])
    plain = Run(loaded, rows, 0, None)
    draft = Run(loaded, rows, arguments.draft_tokens, speculation)
    sampling = Sampling(temperature=arguments.temperature)
    pairs = [
        (plain.rate(arguments.tokens, sampling), draft.rate(arguments.tokens, sampling))
        for _ in range(arguments.repeat)
    ]
    ratio = statistics.median(b / a for a, b in pairs)
    stats = draft.stats
    drafted = stats.drafted_tokens_total / max(1, stats.completion_tokens_total)
    accepted = stats.accepted_tokens_total / max(1, stats.drafted_tokens_total)
    without, with_ = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{rows:>4} {without:>8.0f} {with_:>8.0f} {ratio:>6.2f} {drafted:>8.2f} {accepted:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
