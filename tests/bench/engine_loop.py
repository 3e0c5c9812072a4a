"""The engine's loop without socket and HTTP, closed: a row that ends is followed by the next request at once.

    python tests/bench/engine_loop.py MODEL MAX_ROWS

Reads a line of JSON for each measurement ({"rows", "requests", "words", "first", "max_tokens", "sampling"}) and writes
one ({"tokens_per_second", "tokens", "seconds"}). Prompts are those that the load generator sends, rendered and
tokenised here as there; frames are encoded as for the socket, and prefixes are kept as a manifest has it that does not
say. So what is left between this and HTTP is what HTTP costs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

from runner.bench.job import Load  # noqa: E402
from runner.bench.prompts import answer_tokens, prompt  # noqa: E402
from runner.engine import cuda_kernels  # noqa: E402
from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loader import load  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.plan.resolve import PREFIX_CACHE_BYTES  # noqa: E402
from runner.protocol import FromEngine, Generate, Sampling, Step, encode_frame  # noqa: E402


class ClosedLoop:
    """An engine that always has `rows` requests, until there are no more."""

    def __init__(self, model: Path, max_rows: int) -> None:
        limits = Limits(max_rows=max_rows, max_context=4096, prefix_cache_bytes=PREFIX_CACHE_BYTES)
        cuda_kernels.settle()
        self.engine = Engine(load(model), limits, self._receive)
        self._tokens = 0
        self._ended = 0

    def _receive(self, frame: FromEngine) -> None:
        encode_frame(frame)
        if isinstance(frame, Step):
            for delta in frame.deltas:
                self._tokens += delta.tokens
                self._ended += delta.finish_reason is not None

    def run(self, question: dict[str, Any]) -> dict[str, float]:
        """One measurement."""
        words = Load(
            words=question["words"],
            seed=question["seed"],
            max_tokens=question["max_tokens"],
            spread=question.get("spread", 0.0),
        )
        waiting = iter(range(question["first"], question["first"] + question["requests"]))
        self._tokens = self._ended = 0
        submitted = 0
        began = time.perf_counter()
        while self.engine.busy or self._ended < question["requests"]:
            while submitted - self._ended < question["rows"] and (number := next(waiting, None)) is not None:
                self.engine.submit(
                    Generate(
                        id=number,
                        messages=[{"role": "user", "content": prompt(words, number)}],
                        max_tokens=answer_tokens(words, number),
                        sampling=Sampling(**question["sampling"]),
                    )
                )
                submitted += 1
            self.engine.step()
        seconds = time.perf_counter() - began
        return {"tokens_per_second": self._tokens / seconds, "tokens": self._tokens, "seconds": seconds}


def main() -> None:
    """Serve measurements until standard input ends."""
    loop = ClosedLoop(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(loop.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
