"""The CUDA kernel computes what separate operations compute: shown on the host, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import draw_kernel, draw_source
from runner.engine.draw import Draw
from runner.engine.sampling import Choice, SamplingRow, State
from runner.protocol import Sampling
from tests.engine.cuda_on_host import Run, compiled

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.4, "top_p": 0.3, "min_p": 0.02},
    {"temperature": 0.5, "min_p": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.001},
    {"temperature": 3.0, "top_p": 0.0},
]
VOCABULARIES = [64, 257, 1000]


def cases(vocabulary: int, dtype: mx.Dtype) -> Iterator[tuple[list[SamplingRow], mx.array]]:
    """Every way of sampling in one batch, with plain logits, with equal ones, and with some that are not allowed."""
    rows = [SamplingRow(Sampling(**way), 100 + i, [1], [], False) for i, way in enumerate(WAYS)]
    for seed in range(3):
        logits = mx.random.normal((len(rows), 2, vocabulary), key=mx.random.key(seed)) * (1 + 2 * seed)
        if seed == 1:
            logits = mx.round(logits)
        if seed == 2:
            logits = mx.where(mx.arange(vocabulary) % 3 == 0, logits, -float("inf"))
        yield rows, logits.astype(dtype)


def separately(draw: Draw, logits: mx.array, position: mx.array, *, proposing: bool = False) -> mx.array:
    """The tokens as separate operations choose them."""
    choice = Choice(mx.argmax(logits, axis=-1), logits, State(position, None), None, draw)
    return draw(choice, position, proposing=proposing)


Launch = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def check(launch: Launch, vocabulary: int, dtype: mx.Dtype) -> None:
    for rows, logits in cases(vocabulary, dtype):
        draw = Draw(rows, vocabulary)
        for step in range(4):
            position = mx.full((len(rows), 1), step * 2, dtype=mx.uint32)
            proposing = step == 1
            keys = draw.keys_of(draw.stream(proposing=proposing))
            found = launch(logits, draw.settings, keys, position)
            assert found.tolist() == separately(draw, logits, position, proposing=proposing).tolist()


DEVICE = "static int processors() { return %d; }\n"


class OnHost:
    """Launches the kernel's source here, in blocks of so many threads."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._built: dict[tuple[str, int, int], Run] = {}

    def launch(self, shares: int = 1, *, threads: int = 32, processors: int = 1000) -> Launch:
        """In which so many blocks share a row, on a device that has so many multiprocessors."""

        def launch(logits: mx.array, settings: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
            kind = "bfloat16" if logits.dtype == mx.bfloat16 else "float"
            raw = logits.view(mx.uint16) if kind == "bfloat16" else logits
            values = [np.ascontiguousarray(np.array(array)) for array in (raw, settings, keys, positions)]
            out = np.zeros(logits.shape[:2], dtype=np.uint32)
            parts = np.full((out.size, shares, 2), 0xFFFFFFFF, dtype=np.uint32)
            counters = np.zeros((shares, out.size), dtype=np.int32)
            shapes = [np.array(array.shape, dtype=np.int32) for array in (logits, counters)]
            arrays = [*values, counters, out, parts, *shapes]
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
            blocks = ctypes.c_int(out.size * shares)
            self._run(kind, threads, processors)(blocks, ctypes.c_int(threads), *pointers)
            assert not counters.any()
            return mx.array(out)

        return launch

    def _run(self, kind: str, threads: int, processors: int) -> Run:
        key = (kind, threads, processors)
        if key not in self._built:
            types = [f"const {kind}*", "const float*", "const uint32_t*", "const uint32_t*", "const int*"]
            self._built[key] = compiled(
                self._folder(),
                f"constexpr int THREADS = {threads};\n{DEVICE % processors}{draw_source.HEADER}",
                draw_source.SOURCE,
                {
                    **dict(zip(draw_kernel.INPUTS, types, strict=True)),
                    "out": "uint32_t*",
                    "parts": "uint32_t*",
                    **{f"{name}_shape": "const int*" for name in ("logits", "counters")},
                },
                f"using T = {kind}; constexpr int LEAST_SHIFT = {16 if kind == 'bfloat16' else 0};",
            )
        return self._built[key]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    return OnHost(lambda: tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_on_the_host(on_host: OnHost, vocabulary: int, dtype: mx.Dtype) -> None:
    check(on_host.launch(), vocabulary, dtype)


@pytest.mark.parametrize("shares", [1, 3])
def test_on_the_host_with_two_warps(on_host: OnHost, shares: int) -> None:
    check(on_host.launch(shares, threads=64), 272, mx.bfloat16)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 32_000, 128_256, 151_936])
def test_on_the_device(vocabulary: int, dtype: mx.Dtype) -> None:
    check(draw_kernel.draw_tokens, vocabulary, dtype)
