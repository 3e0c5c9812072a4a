"""What is asked of layers whose weights lie in another order on the CPU, whichever that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import draw, linear_shapes, write_mlx
from tests.engine.drive import Driver, generate
from tests.engine.tiny import encode

ADAPTED = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
"""Layers that `said_alone_and_together` has adapters on."""


def answer(loaded: LoadedModel, text: mx.array) -> mx.array:
    """Logits of a call without caches."""
    logits: mx.array = loaded.model(text)
    return logits


def magnitudes(loaded: LoadedModel) -> dict[str, mx.array]:
    """Of DoRA, for those layers."""
    shapes = linear_shapes(loaded, ADAPTED)
    return {path: 1 + mx.arange(outputs) / outputs for path, (_, outputs) in shapes.items()}


def said_alone_and_together(folder: Path, adapter: Path, magnitudes: Mapping[str, mx.array] | None = None) -> list[str]:
    """What rows with an adapter (written to `adapter`) and without say alone, and so in one batch."""
    loaded, other = load(folder), load(folder)
    pairs = draw(linear_shapes(loaded, ADAPTED), 4, 1)
    source = write_mlx(adapter, pairs, keys=None, scale=1.0, magnitudes=magnitudes)
    alone, together = Driver(loaded), Driver(other)
    for driver in (alone, together):
        driver.engine.load_adapter(AdapterSource("a", str(source)))
    prompts = [encode(text) for text in ("the quick brown fox", "hello world", "def main")]
    keys = ("", "a", "")
    expected = [
        alone.one(prompt=prompt, adapter=key, max_tokens=12).text for prompt, key in zip(prompts, keys, strict=True)
    ]
    for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        together.engine.submit(generate(i, prompt=prompt, adapter=key, max_tokens=12))
    together.drain()
    assert [together.answers[i].text for i in range(3)] == expected
    return expected


class Clock:
    """Time that passes while products are computed: the next of `seconds` for each that is timed."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds, self._now, self._reads = seconds, 0.0, 0

    def __call__(self) -> float:
        # It is read before and after each.
        if self._reads % 2:
            self._now += next(self._seconds)
        self._reads += 1
        return self._now
