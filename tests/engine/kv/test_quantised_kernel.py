"""The kernel that writes and attends to packed keys and values: on the host, and on a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine.kv import quantised_kernel
from runner.engine.kv.calls import Call
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import JoinedPackedCall, JoinedPackedLaunch, PackedCall, PackedLaunch
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.launches import packed_separately, separately, turned
from tests.engine.kv.packed_on_host import PackedOnHost
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


def attended_to(call: PackedCall, written: Sequence[mx.array]) -> mx.array:
    """What the call's queries see of what was written: a value next to the middle of two codes may get either."""
    how, (rows, _, tokens, _) = Quantisation(call.bits, call.group_size), call.queries.shape
    keys, values = (
        how.unpack((codes, scales.astype(mx.float32), biases.astype(mx.float32)))
        for codes, scales, biases in (written[:3], written[3:])
    )
    at = (call.starts[:, None] + mx.arange(tokens))[:, None, :, None]
    at = mx.broadcast_to(at, (rows, keys.shape[1], tokens, 1))
    new = [mx.take_along_axis(array[:rows], at, axis=2) for array in (keys, values)]
    queries = turned(call)[0].astype(mx.float32)
    plain = Call(queries, *new, (keys, values), call.starts, call.scale, call.window, None, None)
    return separately(plain)[0]


def check(
    launch: PackedLaunch,
    geometry: Geometry,
    how: Quantisation,
    dtype: mx.Dtype,
    rows: int = 3,
    longest: int = 40,
    places: int = 48,
) -> None:
    # A GPU's own products of float32, which are compared with, take fewer bits.
    exact = 2e-3 if mx.default_device() == mx.Device(mx.gpu) else 1e-4
    close = {mx.float32: exact, mx.bfloat16: 2e-2, mx.float16: 4e-3}[dtype]
    mx.random.seed(7)
    turns = itertools.cycle([None, *rotations(geometry[2])])
    for plain in cases(geometry, how, dtype, rows, longest, places):
        call = replace(plain, rotation=next(turns))
        _, planes = packed_separately(call)
        mx.eval(planes)
        attended, written = launch(call)
        mx.eval(attended, written)
        assert attended.shape == call.queries.shape
        assert mx.allclose(attended, attended_to(call, written), rtol=close, atol=close).item()
        for mine, other in zip(written, planes, strict=True):
            assert (mine != other).sum().item() <= call.keys.size * how.bits // 32, "written, and nowhere else"
        for part in (slice(3), slice(3, 6)):
            # A rotation's last bit may be another, and the CPU rounds scales before it counts in them.
            step = 2.5 * mx.abs(planes[part][1]).max() + close
            apart = mx.abs(how.unpack(tuple(written[part])) - how.unpack(tuple(planes[part])))  # type: ignore[arg-type]
            assert (apart <= step).all().item(), "written in the right places"


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (8, mx.bfloat16),
        pytest.param(4, mx.bfloat16, marks=pytest.mark.nightly),
        pytest.param(8, mx.float32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_on_the_host(bits: int, dtype: mx.Dtype) -> None:
    check(PackedOnHost(), (4, 2, 64), Quantisation(bits, 64), dtype)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(
    ("geometry", "bits", "size"),
    [
        ((3, 3, 32), 4, 32),
        ((14, 2, 96), 8, 32),
        pytest.param((4, 1, 128), 4, 64, marks=pytest.mark.nightly),
        pytest.param((40, 2, 128), 8, 128, marks=pytest.mark.nightly),
        pytest.param((2, 1, 256), 8, 32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_shapes_of_the_product(geometry: Geometry, bits: int, size: int) -> None:
    """Query heads that fill its lines and that do not, pieces of words, and several scales to a line."""
    launch = PackedOnHost()
    check(launch, geometry, Quantisation(bits, size), mx.bfloat16, rows=2)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(
    ("warps", "splits"),
    [pytest.param(2, 1, marks=pytest.mark.nightly), pytest.param(1, 8, marks=pytest.mark.nightly), (4, 4)],
)
def test_warps_and_blocks_share_keys(warps: int, splits: int) -> None:
    """Also where a row has fewer tiles than there are of them, and more than are on their way at once."""
    launch = PackedOnHost(warps, splits)
    check(launch, (4, 2, 64), Quantisation(8, 64), mx.bfloat16, longest=200, places=208)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("crowd", [1, 1 << 20])
def test_what_is_behind_a_row_may_be_no_numbers(crowd: int) -> None:
    """And rows with less to read than there are blocks are read by fewer; most of theirs leave nothing."""
    how, launch = Quantisation(8, 64), PackedOnHost(4, 8, crowd=crowd)
    for call in cases((4, 2, 64), how, mx.bfloat16, 3, 140, 160):
        starts = mx.concatenate([call.starts, mx.array([0, 0])])[:, None, None, None]
        behind = mx.arange(160)[:, None] >= starts
        poisoned = [
            plane if plane.dtype == mx.uint32 else mx.where(behind, float("nan"), plane).astype(plane.dtype)
            for plane in call.planes
        ]
        attended, _ = launch(replace(call, planes=poisoned))
        _, written = packed_separately(call)
        assert mx.allclose(attended, attended_to(call, written), rtol=2e-2, atol=2e-2).item()


@pytest.mark.usefixtures("arrays_on_the_host")
def test_scales_that_begin_anywhere() -> None:
    check(PackedOnHost(apart=2), (4, 2, 64), Quantisation(8, 32), mx.bfloat16)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("size", [1e-3, 3e4])
def test_sizes_that_no_half_holds(size: float) -> None:
    """Queries of that size, keys and values of its inverse, and keys whose values are much larger than others'."""
    launch, how = PackedOnHost(), Quantisation(8, 64)
    for call in cases((4, 2, 64), how, mx.bfloat16, 3, 40, 48):
        held = [how.unpack(tuple(call.planes[part])) / size for part in (slice(3), slice(3, 6))]  # type: ignore[arg-type]
        held[1] = held[1] * mx.power(2.0, -(mx.arange(48) % 17))[:, None]
        planes = [part for array in held for part in how.pack(array.astype(mx.bfloat16))]
        new = {"queries": call.queries * size, "keys": call.keys / size, "values": call.values / size}
        call = replace(call, **new, planes=planes)  # type: ignore[arg-type]
        attended, written = launch(call)
        expected = attended_to(call, written) * size
        assert mx.allclose(attended * size, expected, rtol=2e-2, atol=2e-3)


def check_joined(
    launch: PackedLaunch, joined_launch: JoinedPackedLaunch, tokens: int, geometry: Geometry, bits: int, places: int
) -> None:
    """What one product has need not be taken apart, to the bit."""
    (plain,) = (
        call
        for call in cases(geometry, Quantisation(bits, 32), mx.float16, rows=3, longest=places - 8, places=places)
        if call.window is None and call.queries.shape[2] == tokens
    )
    call = replace(plain, rotation=rotations(geometry[2])[0])
    assert call.rotation is not None
    parts = [part.swapaxes(1, 2).reshape(3, tokens, -1) for part in (call.queries, call.keys, call.values)]
    copies = [mx.contiguous(plane + 0) for plane in call.planes]
    mx.eval(copies)
    expected, right = launch(call)
    mx.eval(expected)  # which has written to the planes
    joined, how = mx.concatenate(parts, axis=-1), (call.bits, call.group_size)
    given = JoinedPackedCall(joined, *geometry, copies, call.starts, call.scale, *how, None, call.rotation)
    attended, written = joined_launch(given)
    assert mx.array_equal(attended, expected.swapaxes(1, 2).reshape(3, tokens, -1)).item()
    assert all(mx.array_equal(mine, its).item() for mine, its in zip(written, right, strict=True))


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(("tokens", "geometry", "bits"), [(1, (4, 2, 64), 8), (3, (3, 1, 64), 4)])
def test_what_one_product_has_need_not_be_taken_apart(tokens: int, geometry: Geometry, bits: int) -> None:
    launch = PackedOnHost(splits=2)
    check_joined(launch, launch.joined, tokens, geometry, bits, 48)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("tokens", "bits"), [(1, 8), (3, 4)])
def test_nor_on_the_device(tokens: int, bits: int) -> None:
    check_joined(quantised_kernel.attend_and_write, quantised_kernel.attend_joined, tokens, (32, 8, 64), bits, 704)


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
    [
        (64, 8, 64, True),
        (128, 4, 32, True),
        (96, 8, 32, True),
        (80, 8, 16, False),
        (64, 6, 32, False),
        (512, 8, 64, False),
    ],
)
def test_what_it_takes(width: int, bits: int, size: int, possible: bool) -> None:
    for tokens in (1, 17):
        queries, new = mx.zeros((2, 4, tokens, width)), mx.zeros((2, 2, tokens, width))
        assert quantised_kernel.applies(queries, new, new, bits, size) == (possible and tokens == 1)


def test_blocks_share_a_row_where_they_are_few_or_it_is_long() -> None:
    way = quantised_kernel.shape(64, 2, (8, 64), 32, 8, 1)
    several = quantised_kernel.shape(64, 2, (8, 64), 32, 8, 4)
    assert way is not None
    assert several is not None
    assert quantised_kernel.splits(way, 8, 16640) == 64, "four to a multiprocessor"
    assert quantised_kernel.splits(several, 8, 16640) == 32, "three have room"
    assert quantised_kernel.splits(way, 32, 16640) == 16
    assert quantised_kernel.splits(way, 64, 2304) == 8
    assert quantised_kernel.splits(way, 8, 512) == 8, "a tile for each warp"
    assert quantised_kernel.splits(way, 1024, 16384) == 8
    assert quantised_kernel.splits(way, 1024, 512) == 1


def test_tokens_share_a_block() -> None:
    def lines(tokens: int, width: int = 64, itemsize: int = 2) -> tuple[int, int]:
        way = quantised_kernel.shape(width, itemsize, (8, 64), 32, 8, tokens)
        assert way is not None
        return way.lines, way.blocks(3, tokens) // 24

    assert [lines(tokens) for tokens in (1, 2, 3, 4, 5)] == [(8, 1), (16, 1), (16, 1), (16, 1), (16, 2)]
    assert lines(4, 256) == lines(4, 128, 4) == (8, 2), "sums of more have no room in registers"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("geometry", "how", "dtype", "tokens"),
    [
        ((32, 8, 64), Quantisation(8, 64), mx.bfloat16, 1),
        ((32, 8, 64), Quantisation(4, 64), mx.float16, 1),
        ((32, 8, 64), Quantisation(8, 64), mx.bfloat16, 4),
        ((32, 8, 128), Quantisation(8, 64), mx.bfloat16, 1),
        ((32, 8, 128), Quantisation(8, 64), mx.bfloat16, 4),
        ((32, 8, 128), Quantisation(4, 32), mx.bfloat16, 4),
        ((16, 8, 256), Quantisation(8, 64), mx.bfloat16, 4),
        ((3, 3, 32), Quantisation(8, 32), mx.float32, 4),
        ((32, 8, 128), Quantisation(8, 32), mx.float32, 4),
    ],
    ids=str,
)
def test_compiles_for_the_device(geometry: Geometry, how: Quantisation, dtype: mx.Dtype, tokens: int) -> None:
    """So many blocks as a GPU is said to be busy with have room there."""
    heads, groups, width = geometry
    way = quantised_kernel.shape(width, dtype.size, (how.bits, how.group_size), heads, groups, tokens)
    assert way is not None
    sizes = quantised_kernel.constants(width, how.bits, how.group_size, 0, way)
    # The sine of a large number takes local memory.
    found = compile_kernel(
        quantised_kernel.header(width**-0.5),
        quantised_kernel.SOURCE,
        quantised_kernel.types(dtype),
        {"out": dtype, "partial": mx.float32},
        [("T", dtype), *sizes, ("ROTATED", 0), ("TRADITIONAL", 0)],
    )
    assert found.local == 0
    assert -(-found.registers // 8) * 8 * way.warps * 32 * way.at_once <= 65536
    assert (way.shared_memory + 1024) * way.at_once <= 228 * 1024
