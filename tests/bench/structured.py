"""What grammars cost a batch: tokens a second with none, with one row that has one, and with all rows.

    python tests/bench/structured.py [MODEL_FOLDER] [--rows 1 4 16] [--tokens 96] [--repeat 5]

The grammar allows every text, so that all ways generate as much: what is measured is reading the tokens before the next
are chosen, computing masks, and applying them. Medians over interleaved runs, greedy, on demo-chat by default.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loader import LoadedModel  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.protocol import FromEngine, Generate, Grammar, Step  # noqa: E402
from tests.bench.engine_throughput import load_endless, prompt  # noqa: E402

ANYTHING = Grammar("regex", r"(.|\n)*", "structured_outputs.regex")


class Run:
    """An engine for so many rows, the grammar compiled."""

    def __init__(self, loaded: LoadedModel, rows: int) -> None:
        self._rows = rows
        self._tokens = 0
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._engine = Engine(loaded, Limits(max_rows=rows), self._count, 0, lambda: self._woken.put(None))
        self.rate(1, 1)

    def _count(self, frame: FromEngine) -> None:
        if isinstance(frame, Step):
            self._tokens += sum(delta.tokens for delta in frame.deltas)

    def rate(self, constrained: int, tokens: int) -> float:
        """Tokens a second, the first `constrained` rows with the grammar."""
        self._tokens = 0
        started = time.perf_counter()
        for row in range(self._rows):
            grammar = ANYTHING if row < constrained else None
            self._engine.submit(Generate(id=row, prompt=prompt(row, 32), max_tokens=tokens, grammar=grammar))
        while self._engine.busy or self._engine.rows:
            if not self._engine.busy:
                self._woken.get()
            self._engine.step()
        return self._tokens / (time.perf_counter() - started)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "examples" / "models" / "demo-chat")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    loaded = load_endless(arguments.model)
    print(f"{'rows':>4} {'none':>9} {'one':>9} {'all':>9} {'one/none':>9} {'all/none':>9}")
    for rows in arguments.rows:
        run = Run(loaded, rows)
        measured = [[run.rate(count, arguments.tokens) for count in (0, 1, rows)] for _ in range(arguments.repeat)]
        none, one, every = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{rows:>4} {none:>9.0f} {one:>9.0f} {every:>9.0f} {one / none:>9.2f} {every / none:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
