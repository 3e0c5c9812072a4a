"""What is predicted of memory beside what is then held, for every architecture that the tests can build.

    python tests/bench/estimates.py > tests/bench/estimates.md
    python tests/bench/estimates.py --geometry 1b,8b >> tests/bench/estimates.md

Weights as the engine has them on this machine, the same quantised at load (affine, 4 bits, groups of 32), and what a
row of 768 tokens keeps. Tiny models with random weights: the arithmetic is that of any size. With `--geometry`, models
of a real size (`tests/bench/estimates_geometry.py`), on whatever device there is.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runner.engine import environment

if __name__ == "__main__":
    environment.restart_if_needed(time.monotonic())

import mlx.core as mx
from mlx.utils import tree_flatten

from runner.engine.conversion import convert
from runner.engine.loader import load_weights
from runner.inspect.config import Packing
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import DigestCache
from runner.inspect.model import ModelFacts, read_model
from runner.inspect.quantize import Wanted, misfit, quantized
from tests.bench.estimates_geometry import GEOMETRIES, section
from tests.inspect.architectures import SPECIAL, build, filled

TOKENS = 768
PACKING = Packing(4, 32)
NOT_BUILT = {"llama4"}
"""mlx-lm's cache for it cannot hold several rows, so the engine refuses it."""


class Measured(NamedTuple):
    """Bytes, predicted and real; real is 0 where upstream cannot load what it was given, with the reason."""

    what: str
    predicted: int
    real: int
    why: str = ""

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the real."""
        return self.predicted / self.real - 1 if self.real else 0.0


def measure(kind: str, folder: Path) -> list[Measured]:
    """One architecture."""
    mx.random.seed(0)
    config, model = build(kind)
    source = folder / "source"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (source / "config.json").write_text(json.dumps(config))
    facts = read_model(source, str(source), DigestCache())
    return [_weights(facts, source), _quantised(facts, source, folder / "packed"), _row(facts, model)]


def _memory(facts: ModelFacts) -> Any:
    limits = Limits(rows=1, context=TOKENS, prefill_step=256, prefix_cache=0)
    return model_memory(facts, [], None, limits, float32=True)


def _held(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    model, _ = load_weights(folder, config, [])
    model.set_dtype(mx.float32)
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _weights(facts: ModelFacts, source: Path) -> Measured:
    predicted = _memory(facts).weights
    try:
        return Measured("weights", predicted, _held(source))
    except Exception as error:  # noqa: BLE001 - a sample that upstream's own loader does not take
        return Measured("weights", predicted, 0, str(error).splitlines()[0])


def _quantised(facts: ModelFacts, source: Path, target: Path) -> Measured:
    if (why := misfit(facts, Wanted(PACKING))) is not None:
        return Measured("weights, 4 bits", 0, 0, f"refused: {why.message}")
    predicted = _memory(quantized(facts, Wanted(PACKING))).weights
    packing = {"bits": PACKING.bits, "group_size": PACKING.group_size, "mode": "affine", "layers": {}, "dtype": ""}
    settings = {**packing, "trust_remote_code": False}
    try:
        convert(source, target, settings, lambda done, of: None)
        return Measured("weights, 4 bits", predicted, _held(target))
    except Exception as error:  # noqa: BLE001 - see above
        return Measured("weights, 4 bits", predicted, 0, str(error).splitlines()[0])


def _row(facts: ModelFacts, model: Any) -> Measured:
    model.set_dtype(mx.float32)
    caches = filled(model, TOKENS - 1)
    model(mx.zeros((1, 1), dtype=mx.uint32), cache=caches)
    return Measured(f"row of {TOKENS}", _memory(facts).kv_row, sum(cache.nbytes for cache in caches))


def table(kinds: list[str]) -> str:
    """All of it, as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    machine = f"{platform.system()} {platform.machine()}"
    lines = [
        "# Memory, predicted and real",
        "",
        f"`python tests/bench/estimates.py` on {machine}, CPU, Python {platform.python_version()}, {versions}. Bytes.",
        "",
        "| architecture | what | predicted | real | error |",
        "|---|---|---:|---:|---:|",
    ]
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            for found in measure(kind, Path(folder)):
                real = f"{found.real:,}" if found.real else "-"
                error = f"{found.error:+.2%}" if found.real else f"{found.why[:80]}".replace("|", "/")
                lines.append(f"| {kind} | {found.what} | {found.predicted:,} | {real} | {error} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="architectures, all by default")
    parser.add_argument("--geometry", help=f"of {', '.join(GEOMETRIES)}, by commas, in place of architectures")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--compute", action="store_true", help="have the model fill the caches")
    given = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # upstream prints
    if given.geometry:
        names = given.geometry.split(",")
        if unknown := sorted(set(names) - GEOMETRIES.keys()):
            parser.error(f"--geometry: {', '.join(unknown)} is none of {', '.join(GEOMETRIES)}")
        out.write(section(names, given.rows, given.context, compute=given.compute))
    else:
        out.write(table(given.kinds or sorted(SPECIAL.keys() - NOT_BUILT)))


if __name__ == "__main__":
    main()
