"""The CUDA kernel computes what separate operations compute: shown on the host, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import draw_kernel
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


def separately(draw: Draw, logits: mx.array, position: mx.array) -> mx.array:
    """The tokens as separate operations choose them."""
    choice = Choice(mx.argmax(logits, axis=-1), logits, State(position, None), None, draw)
    return draw(choice, position)


Launch = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def check(launch: Launch, vocabulary: int, dtype: mx.Dtype) -> None:
    for rows, logits in cases(vocabulary, dtype):
        draw = Draw(rows, vocabulary)
        for step in range(4):
            position = mx.full((len(rows), 1), step * 2, dtype=mx.uint32)
            own = draw.proposing if step == 1 else draw
            keys = own.keys_of(0)
            found = launch(logits, draw.settings, keys, position)
            assert found.tolist() == separately(own, logits, position).tolist()


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[mx.Dtype, int], Launch]:
    """`on_host(dtype, threads)` launches the kernel's source here."""
    built: dict[tuple[str, int], Run] = {}

    def get(dtype: mx.Dtype, threads: int) -> Launch:
        kind = "bfloat16" if dtype == mx.bfloat16 else "float"
        key = (kind, threads)
        if key not in built:
            built[key] = compiled(
                tmp_path_factory.mktemp("kernel"),
                f"constexpr int THREADS = {threads};\n{draw_kernel.HEADER}",
                draw_kernel.SOURCE,
                {
                    "logits": f"const {kind}*",
                    "logits_shape": "const int*",
                    "settings": "const float*",
                    "keys": "const uint32_t*",
                    "positions": "const uint32_t*",
                    "out": "uint32_t*",
                },
                f"using T = {kind}; constexpr int LEAST_SHIFT = {16 if kind == 'bfloat16' else 0};",
            )

        def launch(logits: mx.array, settings: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
            raw = logits.view(mx.uint16) if dtype == mx.bfloat16 else logits
            values = [np.ascontiguousarray(np.array(array)) for array in (raw, settings, keys, positions)]
            shape = np.array(logits.shape, dtype=np.int32)
            out = np.zeros(logits.shape[:2], dtype=np.uint32)
            arrays = [values[0], shape, *values[1:], out]
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
            built[key](ctypes.c_int(out.size), ctypes.c_int(threads), *pointers)
            return mx.array(out)

        return launch

    return get


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_on_the_host(on_host: Callable[[mx.Dtype, int], Launch], vocabulary: int, dtype: mx.Dtype) -> None:
    check(on_host(dtype, 1), vocabulary, dtype)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_on_the_host_with_two_warps(on_host: Callable[[mx.Dtype, int], Launch]) -> None:
    """Threads that wait for each other thousands of times: minutes on two cores."""
    rows = [SamplingRow(Sampling(**WAYS[way]), 7, [1], [], False) for way in (2, 6)]
    draw = Draw(rows, 100)
    logits = mx.round(mx.random.normal((2, 1, 100), key=mx.random.key(0)) * 2)
    position = mx.zeros((2, 1), dtype=mx.uint32)
    found = on_host(mx.float32, 64)(logits, draw.settings, draw.keys_of(0), position)
    assert found.tolist() == separately(draw, logits, position).tolist()


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 32_000, 128_256, 151_936])
def test_on_the_device(vocabulary: int, dtype: mx.Dtype) -> None:
    check(draw_kernel.draw_tokens, vocabulary, dtype)
