"""Trains a target that demo-draft can draft for, deeper than demo-chat, for measuring speculation with a trained pair.

    python tests/bench/trained_pair.py FOLDER [--layers 16] [--hidden 512] [--seconds 100] [--tokens 16384]
    python tests/bench/speculation.py FOLDER --rows 1 4 16 32 128

demo-chat has six layers and its draft two: on a GPU, where a layer's launches are what a step consists of, a round of
such a pair costs more than it gains. This one learns the same corpus, with the same tokenizer, in as many steps as fit
into `--seconds`. FOLDER gets a model folder like demo-chat's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from examples.models.train.data import batches, make_rows  # noqa: E402
from examples.models.train.fit import Plan, fit  # noqa: E402
from examples.models.train.network import model_config, new_model, parameter_count, save_model  # noqa: E402
from tests.bench.record import progress  # noqa: E402

DEMO = ROOT / "examples" / "models" / "demo-chat"
SEED: Final = 31
_TRIED: Final = 12
"""Steps that tell how long one takes, after as many that compile."""


def main() -> None:
    """Train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--conversations", type=int, default=100_000)
    arguments = parser.parse_args()
    rows = make_rows(DEMO / "tokenizer.json", SEED, {"base": 1.0}, arguments.conversations)
    progress(f"{sum(len(part.ids) for part in rows.values()):,} conversations")
    vocabulary = Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab_size()
    config = configuration(vocabulary, arguments.layers, arguments.hidden)
    drawn = batches(rows, SEED, arguments.tokens)
    began = time.perf_counter()
    seconds = seconds_of_a_step(config, drawn, arguments)
    steps = max(_TRIED, int((arguments.seconds - (time.perf_counter() - began)) / seconds))
    model = new_model(config, SEED)
    progress(f"{parameter_count(model):,} parameters, {steps} steps of {seconds:.3f} s on {mx.default_device()}")
    fit(model, drawn, Plan(steps, arguments.rate, arguments.tokens), "target")
    save_model(model, config, arguments.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO / name, arguments.folder / name)
    progress(f"saved to {arguments.folder}")


def configuration(vocabulary: int, layers: int, hidden: int) -> dict[str, Any]:
    """demo-chat's, with another shape: heads of 64, two of which share keys."""
    heads = hidden // 64
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": hidden * 5 // 2}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
    return model_config("demo-chat", vocabulary) | shape


def seconds_of_a_step(
    config: dict[str, Any], drawn: Iterator[tuple[np.ndarray, np.ndarray]], arguments: argparse.Namespace
) -> float:
    """As training another model of this kind shows it, compiled before."""
    model = new_model(config, SEED + 1)
    for _ in range(2):
        began = time.perf_counter()
        fit(model, drawn, Plan(_TRIED, arguments.rate, arguments.tokens), "trial")
    return (time.perf_counter() - began) / _TRIED


if __name__ == "__main__":
    main()
