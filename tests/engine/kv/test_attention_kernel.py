"""The kernel that writes and attends computes what separate operations compute: on the host, and on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine.kv import attention_kernel
from runner.engine.kv.calls import Call, Launch
from runner.engine.kv.rotary import Rotation
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.launches import OnHost, separately

Geometry = tuple[int, int, int]
"""Query heads, key heads, width."""

GEOMETRIES: list[Geometry] = [(4, 2, 64), (3, 3, 80), (16, 1, 32)]


def cases(geometry: Geometry, dtype: mx.Dtype, rows: int, longest: int) -> Iterator[Call]:
    """One and several tokens a row; all that was before, a window of it, and rings."""
    heads, groups, width = geometry
    draw = random.Random(0)
    for tokens, window, ring in [(1, None, None), (3, None, None), (2, 7, None), (1, 8, 8), (4, 6, 9)]:
        lengths = [draw.randrange(longest + 1) for _ in range(rows)]
        # As from one product of all projections: no array is contiguous, and there are more slots than rows.
        projected = mx.random.normal((rows, tokens, heads + 2 * groups, width)).astype(dtype).swapaxes(1, 2)
        places = ring or longest + tokens
        planes = [mx.random.normal((rows + 2, groups, places, width)).astype(dtype) for _ in range(2)]
        if tokens == 3:  # what a write of a whole plane leaves: the new array itself, in its own order
            planes = [mx.contiguous(plane.swapaxes(1, 2)).swapaxes(1, 2) for plane in planes]
        yield Call(
            projected[:, :heads],
            *(projected[:, heads : heads + groups], projected[:, heads + groups :]),
            (planes[0], planes[1]),
            *(mx.array(lengths, dtype=mx.int32), width**-0.5, window, ring, None),
        )


def rotations(width: int) -> list[Rotation]:
    """All of a line and half of it, in either order."""
    frequencies = lambda dims: mx.array([0.9**i for i in range(dims // 2)])  # noqa: E731
    return [
        Rotation(dims, traditional, frequencies(dims), lambda lines, _: lines)
        for dims in (width, width // 4 * 2)
        for traditional in (False, True)
    ]


def check(launch: Launch, geometry: Geometry, dtype: mx.Dtype, rows: int = 3, longest: int = 40) -> None:
    # A GPU's own products of float32, which are compared with, take fewer bits.
    exact = 2e-3 if mx.default_device() == mx.Device(mx.gpu) else 1e-4
    close = {mx.float32: exact, mx.bfloat16: 2e-2, mx.float16: 3e-3}[dtype]
    turned = itertools.cycle([None, *rotations(geometry[2])])
    for plain in cases(geometry, dtype, rows, longest):
        call = replace(plain, rotation=next(turned))
        expected, planes = separately(call)
        mx.eval(expected, planes)
        attended, written = launch(call)
        mx.eval(attended, written)
        assert attended.shape == call.queries.shape
        assert mx.allclose(attended, expected, rtol=close, atol=close).item()
        for mine, other in zip(written, planes, strict=True):
            # A rotation's last bit may be another.
            assert mx.allclose(mine, other, rtol=close, atol=close).item(), "written in the right places"
            assert (mine != other).sum().item() <= call.keys.size, "and nowhere else"


@pytest.fixture(scope="module")
def one_thread(arrays_on_the_host: None) -> OnHost:
    return OnHost()


@pytest.fixture(scope="module")
def two_warps(arrays_on_the_host: None) -> OnHost:
    return OnHost(threads=64)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("splits", [pytest.param(2, marks=pytest.mark.nightly), 8])
def test_several_blocks_share_keys_on_the_host(splits: int) -> None:
    """Also where a row has fewer keys than there are blocks."""
    check(OnHost(splits=splits), (4, 2, 64), mx.float32)


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        (GEOMETRIES[0], mx.float32),
        pytest.param(GEOMETRIES[1], mx.bfloat16, marks=pytest.mark.nightly),
        pytest.param(GEOMETRIES[2], mx.float32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_on_the_host(one_thread: OnHost, geometry: Geometry, dtype: mx.Dtype) -> None:
    check(one_thread, geometry, dtype)


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        ((4, 2, 64), mx.bfloat16),
        pytest.param((3, 3, 80), mx.bfloat16, marks=pytest.mark.nightly),
        pytest.param((2, 1, 256), mx.bfloat16, marks=pytest.mark.nightly),
        pytest.param((8, 2, 128), mx.float32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_on_the_host_with_two_warps(two_warps: OnHost, geometry: Geometry, dtype: mx.Dtype) -> None:
    """Lanes that share a key, keys that share a warp, and warps that share a token."""
    check(two_warps, geometry, dtype, rows=1)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("geometry", [*GEOMETRIES, (32, 8, 64), (32, 8, 128), (8, 1, 256), (8, 4, 96)], ids=str)
@pytest.mark.parametrize("longest", [40, 3000])
def test_on_the_device(geometry: Geometry, dtype: mx.Dtype, longest: int) -> None:
    check(attention_kernel.attend_and_write, geometry, dtype, rows=9, longest=longest)


def test_threads_share_the_work() -> None:
    for width, itemsize, shared in itertools.product([32, 64, 80, 96, 112, 128, 192, 256], [2, 4], range(1, 17)):
        way = attention_kernel.shape(width, itemsize, shared)
        assert way is not None
        assert shared % way.heads == 0
        assert width * itemsize % (16 * way.lanes) == 0
        assert way.threads // 32 * way.heads * (width + 2) * 4 <= 48 * 1024
        assert way.heads * width // way.lanes <= 64


@pytest.mark.parametrize("width", [72, 584])
def test_what_cannot_be_shared_has_no_shape(width: int) -> None:
    assert attention_kernel.shape(width, 2, 1) is None


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("geometry", [(32, 8, 64), (32, 32, 80), (32, 4, 96), (64, 8, 128), (8, 1, 256)], ids=str)
def test_compiles_for_the_device(geometry: Geometry, dtype: mx.Dtype) -> None:
    heads, groups, width = geometry
    way = attention_kernel.shape(width, dtype.size, heads // groups)
    assert way is not None
    arrays = dict.fromkeys(attention_kernel.INPUTS, dtype) | {
        "starts": mx.int32,
        "counters": mx.int32,
        "frequencies": mx.float32,
    }
    sizes = [
        ("D", width),
        ("LANES", way.lanes),
        ("HEADS", way.heads),
        ("THREADS", way.threads),
        ("FEW", 16),
    ]
    for window, ring in [(0, 0), (512, 512 + 16)]:
        template = [("T", dtype), *sizes, ("WINDOW", window), ("RING", ring), ("ROTATED", width), ("TRADITIONAL", 0)]
        header = attention_kernel.header(width**-0.5)
        compile_kernel(header, attention_kernel.SOURCE, arrays, {"out": dtype, "partial": mx.float32}, template)
