"""Tokens a second of the engine's loop alone, beside upstream's BatchGenerator on the same model.

    python tests/bench/engine_throughput.py [MODEL_FOLDER] [--rows 1 4 16] [--tokens 128] [--repeat 5]
        [--adapters 2 | --adapter-folders FOLDER…] [--ways upstream greedy top_p adapters]

Without a folder, a llama of 4 million random weights is built. Adapters are drawn, of rank 8 on every linear layer, or
given; rows take them and the base model in turn, and the last column is their rate beside the base model's. Prints
medians over interleaved runs. Upstream decodes no text, and its rows share one greedy sampler, its fastest way;
the engine's figures include text, stop detection and frames. Prompts are prefilled within the time of both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from math import nan
from pathlib import Path

from msgspec.structs import replace

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine import environment  # noqa: E402

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx  # noqa: E402

from runner.engine.limits import Limits  # noqa: E402
from runner.engine.loader import LoadedModel, load  # noqa: E402
from runner.engine.loop import Engine  # noqa: E402
from runner.protocol import AdapterSource, FromEngine, Generate, Sampling, Step, encode_frame  # noqa: E402
from tests.engine.adapters.folders import draw, linear_shapes, write_mlx  # noqa: E402
from tests.engine.tiny import build_model  # noqa: E402

BENCH_MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
WAYS = ["upstream", "greedy", "top_p", "adapters"]


def prompt(row: int, length: int) -> list[int]:
    """A prompt of its own for every row."""
    return [(7 * i + 13 * row) % 200 + 6 for i in range(length)]


class EngineRun:
    """The engine's loop, its frames encoded as they would be for the socket."""

    def __init__(self, loaded: LoadedModel, rows: int) -> None:
        self._tokens = 0
        self.engine = Engine(loaded, Limits(max_rows=rows), self._count)

    def _count(self, frame: FromEngine) -> None:
        encode_frame(frame)
        if isinstance(frame, Step):
            self._tokens += sum(delta.tokens for delta in frame.deltas)

    def rate(self, rows: int, tokens: int, length: int, *, adapters: list[str], sampling: dict[str, float]) -> float:
        """Tokens a second of `rows` requests that arrive together."""
        self._tokens = 0
        started = time.perf_counter()
        for row in range(rows):
            adapter = adapters[row % len(adapters)] if adapters else ""
            request = Generate(
                id=row, prompt=prompt(row, length), max_tokens=tokens, adapter=adapter, sampling=Sampling(**sampling)
            )
            self.engine.submit(request)
        while self.engine.busy:
            self.engine.step()
        return self._tokens / (time.perf_counter() - started)


def upstream_rate(loaded: LoadedModel, rows: int, tokens: int, length: int) -> float:
    """The same requests through mlx_lm's own continuous batching, greedy."""
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models import base

    # Its own attention, not the one that the engine has put into the model's module.
    module = sys.modules[type(loaded.model).__module__]
    engines = vars(module)["scaled_dot_product_attention"]
    vars(module)["scaled_dot_product_attention"] = base.scaled_dot_product_attention
    generator = BatchGenerator(loaded.model, max_tokens=tokens, completion_batch_size=max(rows, 8))
    started = time.perf_counter()
    generator.insert([prompt(row, length) for row in range(rows)])
    produced = 0
    while responses := generator.next_generated():
        produced += len(responses)
    seconds = time.perf_counter() - started
    generator.close()
    vars(module)["scaled_dot_product_attention"] = engines
    return produced / seconds


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--adapter-folders", type=Path, nargs="+", default=[])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or build_model(Path(scratch, "model"), config=BENCH_MODEL)
        measure(folder, Path(scratch), arguments)


def draw_adapters(loaded: LoadedModel, scratch: Path, count: int, rank: int = 8) -> list[AdapterSource]:
    """Adapters of random values on all linear layers, "a0" and so on, in folders of `scratch`."""
    shapes = linear_shapes(loaded, LINEAR) if count else {}
    folders = [
        write_mlx(scratch / f"a{number}", draw(shapes, rank, number), keys=None, scale=0.1) for number in range(count)
    ]
    return [AdapterSource(folder.name, str(folder)) for folder in folders]


def measure(folder: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    """One line a batch size."""
    loaded = load_endless(folder)
    adapters = [AdapterSource(folder.name, str(folder)) for folder in arguments.adapter_folders]
    adapters = adapters or draw_adapters(loaded, scratch, arguments.adapters)
    print(f"one of {len(adapters)} adapters: {pause(loaded, adapters, arguments.repeat):.1f} ms to load")
    print(f"{folder.name} on {mx.default_device()}: {loaded.weights_bytes / 1e6:.1f} MB, {loaded.dtype}")
    print(f"prompts of {arguments.prompt} tokens, {arguments.tokens} generated; tokens/s, median of {arguments.repeat}")
    print(f"{'rows':>4} {'upstream':>9} {'greedy':>9} {'ratio':>6} {'top_p':>9} {'adapters':>9} {'ratio':>6}")
    for rows in arguments.rows:
        median = dict.fromkeys(WAYS, nan) | rates(folder, rows, adapters, arguments)
        print(
            f"{rows:>4} {median['upstream']:>9.1f} {median['greedy']:>9.1f} "
            f"{median['greedy'] / median['upstream']:>6.2f} {median['top_p']:>9.1f} {median['adapters']:>9.1f} "
            f"{median['adapters'] / median['greedy']:>6.2f}",
            flush=True,
        )


def pause(loaded: LoadedModel, adapters: list[AdapterSource], repeat: int) -> float:
    """Median milliseconds that the loop stands still for an adapter."""
    engine = EngineRun(loaded, 1).engine
    times = []
    for _ in range(repeat):
        for source in adapters:
            started = time.perf_counter()
            engine.load_adapter(source)
            times.append((time.perf_counter() - started) * 1000)
        for source in adapters:
            engine.drop_adapter(source.key)
    return statistics.median(times)


def rates(folder: Path, rows: int, adapters: list[AdapterSource], arguments: argparse.Namespace) -> dict[str, float]:
    """Medians by way of running, all on one batch size."""
    loaded, adapted = load_endless(folder), EngineRun(load_endless(folder), rows)
    plain = EngineRun(loaded, rows)
    for source in adapters:
        adapted.engine.load_adapter(source)
    keys = [source.key for source in adapters]
    size = (rows, arguments.tokens, arguments.prompt)
    ways: dict[str, Callable[[], float]] = {
        "upstream": lambda: upstream_rate(loaded, *size),
        "greedy": lambda: plain.rate(*size, adapters=[], sampling={}),
        "top_p": lambda: plain.rate(*size, adapters=[], sampling=SAMPLED),
        "adapters": lambda: adapted.rate(*size, adapters=keys if rows == 1 else ["", *keys], sampling={}),
    }
    measured: dict[str, list[float]] = {name: [] for name in arguments.ways}
    for _ in range(arguments.repeat):
        for name, rates_of_way in measured.items():
            rates_of_way.append(ways[name]())
    return {name: statistics.median(values) for name, values in measured.items()}


def load_endless(folder: Path) -> LoadedModel:
    """The model, with a tokenizer that has no end tokens, so that every run makes as many tokens."""
    loaded = load(folder)
    return replace(loaded, tokenizer=replace(loaded.tokenizer, eos_ids=frozenset()))


if __name__ == "__main__":
    main()
