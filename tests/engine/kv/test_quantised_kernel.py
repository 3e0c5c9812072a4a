"""The kernel that writes and attends to packed keys and values: on the host, and on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.kv import quantised_kernel
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall, PackedLaunch
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.launches import PackedOnHost, only_with_arrays_on_the_host, packed_separately
from tests.engine.kv.test_attention_kernel import rotations

Geometry = tuple[int, int, int]
"""Query heads, key heads, width."""


def cases(
    geometry: Geometry, how: Quantisation, dtype: mx.Dtype, rows: int, longest: int, places: int
) -> Iterator[PackedCall]:
    """One and several tokens a row; all that was before, or a window of it."""
    heads, groups, width = geometry
    draw = random.Random(0)
    for tokens, window in [(1, None), (3, None), (2, 7)]:
        lengths = [draw.randrange(longest + 1) for _ in range(rows)]
        if rows > 1:
            lengths[1] = 0
        # As from one product of all projections: no array is contiguous.
        projected = mx.random.normal((rows, tokens, heads + 2 * groups, width)).astype(dtype).swapaxes(1, 2)
        held = [mx.random.normal((rows + 2, groups, places, width)).astype(dtype) for _ in range(2)]
        yield PackedCall(
            projected[:, :heads],
            *(projected[:, heads : heads + groups], projected[:, heads + groups :]),
            [part for array in held for part in how.pack(array)],
            *(mx.array(lengths, dtype=mx.int32), width**-0.5, window, how.bits, how.group_size, None),
        )


def check(
    launch: PackedLaunch,
    geometry: Geometry,
    how: Quantisation,
    dtype: mx.Dtype,
    rows: int = 3,
    longest: int = 40,
    places: int = 48,
) -> None:
    exact = 2e-3 if mx.default_device() == mx.Device(mx.gpu) else 1e-4
    # A value next to the middle of two codes may get either.
    close = {mx.float32: max(exact, 32 / (1 << 2 * how.bits)), mx.bfloat16: 3e-2, mx.float16: 4e-3}[dtype]
    mx.random.seed(7)
    turned = itertools.cycle([None, *rotations(geometry[2])])
    for plain in cases(geometry, how, dtype, rows, longest, places):
        call = replace(plain, rotation=next(turned))
        expected, planes = packed_separately(call)
        mx.eval(expected, planes)
        attended, written = launch(call)
        mx.eval(attended, written)
        assert attended.shape == call.queries.shape
        assert mx.allclose(attended, expected, rtol=close, atol=close).item()
        for mine, other in zip(written, planes, strict=True):
            assert (mine != other).sum().item() <= call.keys.size * how.bits // 32, "written, and nowhere else"
        for part in (slice(3), slice(3, 6)):
            # A rotation's last bit may be another, and the CPU rounds scales before it counts in them.
            step = 2.5 * mx.abs(planes[part][1]).max() + close
            apart = mx.abs(how.unpack(tuple(written[part])) - how.unpack(tuple(planes[part])))  # type: ignore[arg-type]
            assert (apart <= step).all().item(), "written in the right places"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    only_with_arrays_on_the_host()
    return tmp_path_factory.mktemp("packed")


@pytest.mark.parametrize("bits", [8, 4])
def test_on_the_host(scratch: Path, bits: int) -> None:
    check(PackedOnHost(scratch / str(bits)), (4, 2, 64), Quantisation(bits, 64), mx.float32)


def test_several_blocks_share_keys_on_the_host(scratch: Path) -> None:
    check(PackedOnHost(scratch / "splits", splits=8), (4, 2, 64), Quantisation(8, 64), mx.bfloat16)


@pytest.mark.parametrize(("bits", "geometry"), [(8, (4, 2, 64)), (4, (4, 1, 128)), (8, (3, 3, 32))])
def test_on_the_host_with_two_warps(scratch: Path, bits: int, geometry: Geometry) -> None:
    """Lanes that share a key, keys that share a warp, and warps that share a token."""
    check(PackedOnHost(scratch / f"{bits}-two", threads=64), geometry, Quantisation(bits, 32), mx.float32, rows=1)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("geometry", "how", "dtype"),
    [
        ((32, 8, 64), Quantisation(8, 64), mx.bfloat16),
        ((32, 8, 128), Quantisation(4, 32), mx.bfloat16),
        ((3, 3, 32), Quantisation(8, 32), mx.float32),
    ],
    ids=str,
)
def test_on_the_device(geometry: Geometry, how: Quantisation, dtype: mx.Dtype) -> None:
    """Rows of no tokens and of many. Each case is compiled, which takes some seconds: so few."""
    check(quantised_kernel.attend_and_write, geometry, how, dtype, rows=5, longest=3000, places=3008)


@pytest.mark.parametrize(
    ("width", "bits", "size", "possible"),
    [(64, 8, 64, True), (128, 4, 32, True), (96, 8, 32, False), (80, 8, 16, False), (64, 6, 32, False)],
)
def test_what_it_takes(width: int, bits: int, size: int, possible: bool) -> None:
    for tokens in (1, 17):
        queries, new = mx.zeros((2, 4, tokens, width)), mx.zeros((2, 2, tokens, width))
        assert quantised_kernel.applies(queries, new, new, bits, size) == (possible and tokens == 1)


@pytest.mark.nightly
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("geometry", [(32, 8, 64), (32, 8, 128), (8, 1, 256), (3, 3, 32)], ids=str)
def test_compiles_for_the_device(geometry: Geometry, bits: int) -> None:
    heads, groups, width = geometry
    way = quantised_kernel.shape(width, heads // groups)
    kinds = dict.fromkeys(quantised_kernel.INPUTS, mx.bfloat16) | {"starts": mx.int32, "counters": mx.int32}
    kinds |= {"held_keys": mx.uint32, "held_values": mx.uint32, "frequencies": mx.float32}
    sizes = {"D": width, "BITS": bits, "GROUP": 32, "MINE": 16, "LANES": way.lanes, "HEADS": way.heads}
    sizes |= {"THREADS": way.threads, "WINDOW": 0, "FEW": 16, "ROTATED": width, "TRADITIONAL": 0}
    compile_kernel(
        quantised_kernel.header(width**-0.5),
        quantised_kernel.SOURCE,
        kinds,
        {"out": mx.bfloat16, "partial": mx.float32},
        [("T", mx.bfloat16), *sizes.items()],
    )
