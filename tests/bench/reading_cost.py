"""What requests that are read (rendered, tokenised) cost the engine's steps: by the main thread, and by one of its own.

    python tests/bench/reading_cost.py [--steps 300] [--python-ms 0.7] [--device-ms 1.2] [--switch-ms 1 5]

A step does what an engine's does: Python, with the interpreter's lock held, and then a wait without it, twice. Requests
are demo-chat's, of about 250 tokens, and of so many messages that rendering takes long; the thread is the real one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine.admission import Admission  # noqa: E402
from runner.engine.chat import ChatTemplate, jinja_render  # noqa: E402
from runner.engine.environment import tokenise_in_one_thread  # noqa: E402
from runner.engine.limits import Limits  # noqa: E402
from runner.engine.narrow import narrow_tokenizer  # noqa: E402
from runner.engine.prepared import Prepared  # noqa: E402
from runner.engine.reading import Reading  # noqa: E402
from runner.protocol import Generate  # noqa: E402

TEXT = " ".join(f"question {i} about what the answer is" for i in range(60))[:1000]
Make = Callable[[int], Generate]


class Reader:
    """An engine's part that the thread uses."""

    limits = Limits()

    def __init__(self) -> None:
        folder = ROOT / "examples" / "models" / "demo-chat"
        config = json.loads((folder / "config.json").read_text())
        tokenizer, template = narrow_tokenizer(folder, config, frozenset())
        chat = ChatTemplate(jinja_render(template or "", tokenizer.special_tokens))
        self._admission = Admission(tokenizer, chat, tokenizer.vocab_size)

    def refusal(self, request: Generate, limits: Limits) -> None:
        """None is refused."""

    def prepare(self, request: Generate, limits: Limits) -> Prepared:
        """As an engine does."""
        return self._admission.prepared(request, limits.max_context)


def short(number: int) -> Generate:
    """About 250 tokens."""
    return Generate(id=number, messages=[{"role": "user", "content": TEXT}])


def long(number: int) -> Generate:
    """12,000 tokens, most of whose time is the template's."""
    roles = ("user", "assistant")
    return Generate(id=number, messages=[{"role": roles[i % 2], "content": "hello there"} for i in range(3000)])


def steps(how: str, make: Make, each: float, reader: Reader, options: argparse.Namespace) -> list[float]:
    """Milliseconds of each step, where so many requests come in `each`."""
    inbox: SimpleQueue[Generate] = SimpleQueue()
    reading = Reading(inbox)
    if how == "thread":
        reading.start(reader, reader.limits)  # type: ignore[arg-type]
    taken, due = [], 0.0
    for number in range(options.steps):
        began = time.perf_counter()
        due += each
        while due >= 1 and how != "none":
            due -= 1
            inbox.put(make(number)) if how == "thread" else reader.prepare(make(number), reader.limits)
        while not reading.events.empty():
            reading.events.get()
        for _ in range(2):
            work(options.loops)
            time.sleep(options.device_ms / 1e3)
        taken.append(1e3 * (time.perf_counter() - began))
    reading.close(10)
    return taken


def work(loops: int) -> None:
    """Python that lets go of the lock only when it is made to."""
    for _ in range(loops):
        pass


def main() -> None:
    """Parse, then measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--python-ms", type=float, default=0.7)
    parser.add_argument("--device-ms", type=float, default=1.2)
    parser.add_argument("--switch-ms", type=float, nargs="+", default=[1.0, 5.0])
    options = parser.parse_args()
    tokenise_in_one_thread()
    reader = Reader()
    began = time.perf_counter()
    work(1_000_000)
    options.loops = int(options.python_ms / 1e3 / (time.perf_counter() - began) * 1_000_000)
    for name, make in (("short", short), ("long", long)):
        began = time.perf_counter()
        reader.prepare(make(0), reader.limits)
        print(f"a {name} one is read in {1e3 * (time.perf_counter() - began):.2f} ms")
    print("ms a step: mean, median, 99th percentile")
    for switch in options.switch_ms:
        sys.setswitchinterval(switch / 1e3)
        for name, make, each in (("0.8 short", short, 0.8), ("4 short", short, 4.0), ("0.04 long", long, 0.04)):
            for how in ("none", "main", "thread"):
                taken = sorted(steps(how, make, each, reader, options))
                tail = taken[int(0.99 * len(taken))]
                figures = f"{statistics.mean(taken):6.2f} {statistics.median(taken):6.2f} {tail:6.2f}"
                print(f"switch {switch:g} ms, {name} a step, read by {how:6} {figures}")


if __name__ == "__main__":
    main()
