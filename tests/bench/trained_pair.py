"""demo-chat in the geometry of a larger model: a trained target that takes as long as a real one, for demo-draft.

    python tests/bench/trained_pair.py FOLDER [--geometry llama-1b] [--layers N] [--hidden N] [--intermediate N]
    python tests/bench/speculation.py FOLDER --rows 1 4 16 32 128

What speculation gains depends on how long target and draft take and on how often the draft is right. A pair of random
weights is right as often as it is told to (`pair.py`), demo-draft as often as training made it; but demo-chat has six
layers and its draft two, and on a GPU, where a layer's launches are what a step consists of, a round of those costs
more than it gains. So FOLDER gets a model that says what demo-chat says and computes what a larger one does: its
weights are demo-chat's, placed in larger matrices whose other parts are random where they take no effect, and zero
where they would (function-preserving expansion: Chen, Goodfellow and Shlens, arXiv:1511.05641). What comes out is the
same up to rounding; `test_trained_pair.py` compares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402

from tests.bench.geometry import GEOMETRIES, usual  # noqa: E402
from tests.bench.record import progress  # noqa: E402

DEMO: Final = ROOT / "examples" / "models" / "demo-chat"
_TEXT: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_ROTATION: Final = ("rope_theta", "rope_scaling", "max_position_embeddings")
"""What the demo's weights were trained with."""

_SMALL: Final = 0.02
"""Spread of weights without effect."""


def main() -> None:
    """Expand, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default=usual())
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--intermediate", type=int)
    arguments = parser.parse_args()
    given = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    expand(arguments.folder, {**GEOMETRIES[arguments.geometry], **changed})
    progress(f"saved to {arguments.folder}")


def expand(folder: Path, geometry: dict[str, Any]) -> Path:
    """A model folder of that geometry, which may not be smaller than demo-chat's in anything. Returns `folder`."""
    demo = json.loads((DEMO / "config.json").read_text())
    # The end is the end, whatever number the geometry has for it.
    special = {name: value for name, value in demo.items() if name.endswith("_token_id")}
    rotation = {name: demo.get(name) for name in _ROTATION}
    config = {**geometry, **special, **rotation, "architectures": demo["architectures"], "head_dim": demo["head_dim"]}
    # Zeros beside a line lower its mean square, and with it what epsilon is to it.
    share = demo["hidden_size"] / config["hidden_size"]
    config["rms_norm_eps"] = demo["rms_norm_eps"] * share
    weights: Any = mx.load(str(DEMO / "model.safetensors"))
    mx.random.seed(0)
    made = _Expansion(demo, config, share**0.5).model(weights)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), made, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in _TEXT:
        shutil.copy(DEMO / name, folder / name)
    return folder


class _Expansion:
    """From the weights of one configuration to those of a larger one; `scale` is what its norms make up for."""

    def __init__(self, old: dict[str, Any], new: dict[str, Any], scale: float) -> None:
        self._old, self._new, self._scale = old, new, scale
        self._dtype = getattr(mx, new["dtype"])

    def model(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """All weights, by name."""
        hidden, vocabulary = self._new["hidden_size"], self._new["vocab_size"]
        # Tokens that are not the demo's have a logit of zero, which is never the largest.
        made = {"model.embed_tokens.weight": self._placed(weights["model.embed_tokens.weight"], (vocabulary, hidden))}
        made["model.norm.weight"] = self._norm(weights["model.norm.weight"])
        for number in range(self._new["num_hidden_layers"]):
            prefix = f"model.layers.{number}."
            old = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
            made |= {prefix + name: array for name, array in self._layer(old).items()}
        return {name: array.astype(self._dtype) for name, array in made.items()}

    def _layer(self, old: dict[str, mx.array]) -> dict[str, mx.array]:
        """Of the demo's, or of one that adds nothing if there is no `old`."""
        new, width = self._new, self._new["head_dim"]
        hidden, inner = new["hidden_size"], new["intermediate_size"]
        queries, heads = self._queries(), new["num_attention_heads"] * width
        groups = new["num_key_value_heads"] * width
        # What reads zeros, or is read by nobody, may be anything.
        reading = {"q": (heads, queries), "k": (groups, None), "v": (groups, None), "gate": (inner, None)}
        reading["up"] = reading["gate"]
        made = {}
        for part, (lines, rows) in reading.items():
            name = f"{'mlp' if part in ('gate', 'up') else 'self_attn'}.{part}_proj.weight"
            made[name] = self._placed(old.get(name), (lines, hidden), rows=rows, idle=True)
        for name, lines, columns in (("self_attn.o_proj", heads, queries), ("mlp.down_proj", inner, None)):
            made[f"{name}.weight"] = self._placed(old.get(f"{name}.weight"), (hidden, lines), columns=columns)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            made[name] = self._norm(old[name]) if old else mx.ones((hidden,))
        return made

    def _queries(self) -> mx.array:
        """Which lines of the larger matrix are the demo's queries: each beside the keys that it had."""
        width, groups = self._new["head_dim"], self._old["num_key_value_heads"]
        shared = self._old["num_attention_heads"] // groups
        spacing = self._new["num_attention_heads"] // self._new["num_key_value_heads"]
        heads = (mx.arange(groups)[:, None] * spacing + mx.arange(shared)).reshape(-1, 1)
        return (heads * width + mx.arange(width)).reshape(-1)

    def _placed(
        self,
        weight: mx.array | None,
        shape: tuple[int, int],
        *,
        rows: mx.array | None = None,
        columns: mx.array | None = None,
        idle: bool = False,
    ) -> mx.array:
        """A matrix of `shape` with `weight` in those rows and columns, or the first ones. With `idle`, the others are
        random: nothing comes of them. Without a weight, and not idle, it is zero."""
        made = mx.random.normal(shape) * _SMALL if idle else mx.zeros(shape)
        if weight is None:
            return made
        rows = mx.arange(weight.shape[0]) if rows is None else rows
        columns = mx.arange(weight.shape[1]) if columns is None else columns
        made[rows[:, None], columns[None]] = weight.astype(mx.float32)
        return made

    def _norm(self, weight: mx.array) -> mx.array:
        return mx.pad(weight.astype(mx.float32) * self._scale, (0, self._new["hidden_size"] - weight.shape[0]))


if __name__ == "__main__":
    main()
