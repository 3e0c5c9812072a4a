"""The CUDA kernel computes what separate operations compute: shown on the host, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import draw_kernel, draw_source
from runner.engine.draw import Draw
from runner.engine.sampling import Choice, SamplingRow, State
from runner.protocol import Sampling
from tests.engine.cuda_compiler import compile_kernel
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
    {"temperature": 20.0, "top_p": 0.9},
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


_UNTOUCHED = 0xFFFFFFFF
DEVICE = "static int processors() { return %d; }\n"


class OnHost:
    """Launches the kernel's source here, in blocks of so many threads."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, int, int], Run] = {}
        self.shared = 0
        """How many blocks left something for the last of those that shared a row."""

    def launch(self, shares: int = 1, *, threads: int = 32, processors: int = 1000) -> Launch:
        """In which so many blocks share a row, on a device that has so many multiprocessors."""

        def launch(logits: mx.array, settings: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
            kind = "bfloat16" if logits.dtype == mx.bfloat16 else "float"
            raw = logits.view(mx.uint16) if kind == "bfloat16" else logits
            values = [np.ascontiguousarray(np.array(array)) for array in (raw, settings, keys, positions)]
            out = np.zeros(logits.shape[:2], dtype=np.uint32)
            parts = np.full((out.size, shares, 2), _UNTOUCHED, dtype=np.uint32)
            counters = np.zeros((shares, out.size), dtype=np.int32)
            shapes = [np.array(array.shape, dtype=np.int32) for array in (logits, counters)]
            arrays = [*values, counters, out, parts, *shapes]
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
            blocks = ctypes.c_int(out.size * shares)
            self._run(kind, threads, processors)(blocks, ctypes.c_int(threads), *pointers)
            assert not counters.any()
            self.shared = int((parts != _UNTOUCHED).any(axis=(0, 2)).sum())
            return mx.array(out)

        return launch

    def _run(self, kind: str, threads: int, processors: int) -> Run:
        key = (kind, threads, processors)
        if key not in self._built:
            types = [f"const {kind}*", "const float*", "const uint32_t*", "const uint32_t*", "const int*"]
            self._built[key] = compiled(
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
def on_host() -> OnHost:
    return OnHost()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_on_the_host(on_host: OnHost, vocabulary: int, dtype: mx.Dtype) -> None:
    check(on_host.launch(), vocabulary, dtype)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize(
    "vocabulary", [pytest.param(272, marks=pytest.mark.nightly), 999, pytest.param(4096, marks=pytest.mark.nightly)]
)
def test_on_the_host_with_two_warps(on_host: OnHost, vocabulary: int, shares: int) -> None:
    check(on_host.launch(shares, threads=64), vocabulary, mx.bfloat16)


def test_shares_are_exact_to_a_hundred_thousandth(on_host: OnHost) -> None:
    """One token stays alone by so much less than its share, and all others with it by so much more."""
    depths = mx.array([0.05, 0.93, 3.3, 9.7])
    share = 1 / (1 + 63 * mx.exp(-depths))
    logits = mx.where(mx.arange(64) == 5, 0, -depths[:, None])[:, None]
    for factor, alone in ((1 - 1e-5, True), (1 + 1e-5, False)):
        ways = [Sampling(temperature=1000.0, top_p=some * factor) for some in share.tolist()]
        draw = Draw([SamplingRow(way, i, [1], [], False) for i, way in enumerate(ways)], 64)
        at = [mx.full((4, 1), step, dtype=mx.uint32) for step in range(20)]
        found = mx.stack([on_host.launch()(logits, draw.settings, draw.keys_of(0), position) for position in at])
        assert mx.all(found == 5, axis=0).flatten().tolist() == [alone] * 4


@pytest.mark.nightly
def test_a_smaller_device_has_fewer_blocks_share_a_row(on_host: OnHost) -> None:
    rows = len(WAYS) * 2
    for processors, shared in ((1, 0), (rows * 2, 2), (rows * 5, 3)):
        check(on_host.launch(3, processors=processors), 272, mx.bfloat16)
        assert on_host.shared == shared


@pytest.mark.parametrize("value", [-float("inf"), -3.3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("shares", [1, 2])
def test_where_nothing_can_be_drawn_it_is_some_token(on_host: OnHost, shares: int, value: float) -> None:
    """What the logits are is found out elsewhere; a token has to be one."""
    rows = [SamplingRow(Sampling(**way), 1, [1], [], False) for way in WAYS]
    draw = Draw(rows, 96)
    for dtype in (mx.float32, mx.bfloat16):
        logits = mx.full((len(rows), 1, 96), value, dtype=dtype)
        position = mx.zeros((len(rows), 1), dtype=mx.uint32)
        found = on_host.launch(shares)(logits, draw.settings, draw.keys_of(0), position)
        assert mx.max(found).item() < 96


def test_blocks_share_rows_while_there_are_processors_left() -> None:
    assert [draw_kernel.splits(rows) for rows in (1, 16, 17, 32, 66, 67, 500)] == [8, 8, 7, 4, 2, 1, 1]


def test_every_row_that_is_shared_has_a_counter_which_no_other_launch_at_once_has() -> None:
    for rows in range(1, 133):
        shares = draw_kernel.splits(rows)
        arrays = [draw_kernel.counters(shares) for _ in range(4)]
        assert len({id(array) for array in arrays}) == 4
        assert arrays[0].shape[0] == shares
        assert shares == 1 or arrays[0].size // shares >= rows


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_a_block_fits_on_a_multiprocessor(dtype: mx.Dtype) -> None:
    """Of 65,536 registers. Values that have no room in them would be in memory."""
    inputs = dict(zip(draw_kernel.INPUTS, [dtype, mx.float32, mx.uint32, mx.uint32, mx.int32], strict=True))
    outputs = {"out": mx.uint32, "parts": mx.uint32}
    template = [("T", dtype), ("LEAST_SHIFT", draw_kernel._LEAST_SHIFTS[dtype])]
    found = compile_kernel(draw_kernel.header(), draw_source.SOURCE, inputs, outputs, template)
    assert found.registers * draw_kernel.THREADS <= 65_536
    assert found.local == 0


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 32_000, 128_256, 151_936])
def test_on_the_device(vocabulary: int, dtype: mx.Dtype) -> None:
    check(draw_kernel.draw_tokens, vocabulary, dtype)
