"""Few tokens' attention by tensor cores computes what separate operations compute, on the host."""

from __future__ import annotations

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine import cuda_kernels
from runner.engine.kv import attention_kernel, decode_kernel
from runner.engine.kv.calls import JoinedCall, JoinedLaunch, Launch
from runner.engine.kv.decode_source import JOINED, SOURCE
from runner.engine.kv.masks import FEW
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.decode_on_host import DecodeOnHost
from tests.engine.kv.launches import separately
from tests.engine.kv.test_attention_kernel import Geometry, cases, check, rotations

BUSY, IDLE = 1, 1 << 20
"""What makes any number of blocks enough, or too few."""


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(
    ("tokens", "rotation", "splits", "crowd", "apart"),
    [
        (1, 0, 4, IDLE, 0),
        (3, 2, 2, IDLE, 8),
        pytest.param(1, 1, 1, IDLE, 8, marks=pytest.mark.nightly),
        pytest.param(3, 3, 8, BUSY, 0, marks=pytest.mark.nightly),
    ],
)
def test_what_is_behind_a_row_may_be_no_numbers(
    tokens: int, rotation: int, splits: int, crowd: int, apart: int
) -> None:
    """And rows with less to read than there are blocks are read by fewer."""
    (plain,) = (
        call
        for call in cases((4, 1, 64), mx.bfloat16, rows=3, longest=200)
        if call.window is None and call.queries.shape[2] == tokens
    )
    call = replace(plain, rotation=rotations(64)[rotation])
    expected, right = separately(call)
    places = mx.arange(call.planes[0].shape[2])[None, None, :, None]
    starts = mx.concatenate([call.starts, mx.array([0, 0])])[:, None, None, None]
    poisoned = [mx.where(places >= starts, float("nan"), plane).astype(mx.bfloat16) for plane in call.planes]
    launch = DecodeOnHost(splits, crowd=crowd, apart=apart)
    attended, written = launch(replace(call, planes=(poisoned[0], poisoned[1])))
    assert mx.allclose(attended, expected, rtol=2e-2, atol=2e-2).item()
    for mine, its in zip(written, right, strict=True):
        new = (places >= starts) & (places < starts + tokens) & (mx.arange(5) < 3)[:, None, None, None]
        assert mx.allclose(mx.where(new, mine, 0), mx.where(new, its, 0), rtol=1e-2, atol=1e-2).item()
        assert mx.all((places < starts + tokens) | mx.isnan(mine)).item(), "nothing else is written"


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("ring", [8, pytest.param(9, marks=pytest.mark.nightly)])
def test_a_window_in_a_ring(ring: int) -> None:
    (call,) = (call for call in cases((4, 1, 64), mx.float16, rows=3, longest=60) if call.ring == ring)
    expected, right = separately(call)
    attended, written = DecodeOnHost(splits=2)(call)
    assert mx.allclose(attended, expected, rtol=3e-3, atol=3e-3).item()
    assert all(mx.array_equal(mine, its).item() for mine, its in zip(written, right, strict=True))


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("geometry", "dtype", "splits", "crowd", "apart"),
    [
        ((4, 1, 64), mx.bfloat16, 1, IDLE, 0),
        ((4, 1, 64), mx.float16, 4, IDLE, 8),
        ((8, 1, 64), mx.bfloat16, 8, BUSY, 0),
        ((3, 3, 64), mx.bfloat16, 2, IDLE, 0),
        ((20, 1, 64), mx.float16, 2, IDLE, 0),
        ((10, 2, 128), mx.bfloat16, 2, IDLE, 8),
        ((2, 1, 192), mx.bfloat16, 2, IDLE, 0),
        ((8, 1, 256), mx.float16, 1, IDLE, 0),
    ],
    ids=str,
)
def test_on_the_host(geometry: Geometry, dtype: mx.Dtype, splits: int, crowd: int, apart: int) -> None:
    check(DecodeOnHost(splits, crowd=crowd, apart=apart), geometry, dtype, rows=3, longest=150)


def check_joined(launch: Launch, joined_launch: JoinedLaunch, tokens: int, geometry: Geometry, longest: int) -> None:
    """What one product has need not be taken apart, to the bit; wherever it lies."""
    heads, groups, width = geometry
    (plain,) = (
        call
        for call in cases(geometry, mx.bfloat16, rows=3, longest=longest)
        if call.window is None and call.queries.shape[2] == tokens
    )
    call = replace(plain, rotation=rotations(width)[0])
    assert call.rotation is not None
    parts = [part.swapaxes(1, 2).reshape(3, tokens, -1) for part in (call.queries, call.keys, call.values)]
    joined = mx.concatenate([*parts, parts[0]], axis=-1)[..., : (heads + 2 * groups) * width]
    copies = [mx.contiguous(plane + 0) for plane in call.planes]
    mx.eval(copies)
    expected, right = launch(call)
    mx.eval(expected)  # which has written to the planes
    given = JoinedCall(
        joined, heads, groups, width, (copies[0], copies[1]), call.starts, call.scale, None, call.rotation
    )
    attended, written = joined_launch(given)
    assert mx.array_equal(attended, expected.swapaxes(1, 2).reshape(3, tokens, -1)).item()
    assert all(mx.array_equal(mine, its).item() for mine, its in zip(written, right, strict=True))


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize(("tokens", "geometry"), [(1, (4, 2, 64)), (3, (3, 1, 64))])
def test_what_one_product_has_need_not_be_taken_apart(tokens: int, geometry: Geometry) -> None:
    launch = DecodeOnHost(splits=2)
    check_joined(launch, launch.joined, tokens, geometry, 60)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 3])
def test_nor_on_the_device(tokens: int) -> None:
    check_joined(attention_kernel.attend_and_write, attention_kernel.attend_joined, tokens, (32, 8, 64), 700)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_that_compiles_for_the_device(dtype: mx.Dtype) -> None:
    way = decode_kernel.shape(dtype, 64, 32, 8, 1, FEW)
    assert way is not None
    numbers = decode_kernel.constants(way, 0, 0, (("ROTATED", 64), ("TRADITIONAL", 0)))
    made = compile_kernel(
        decode_kernel.whole_header(dtype, numbers, 0.125),
        cuda_kernels.terse(JOINED + SOURCE),
        dict(attention_kernel.joined_types(dtype)),
        {"out": dtype, "partial": mx.float32},
    )
    assert made.registers * way.threads <= 65536 // 2, "two blocks have room on a multiprocessor"
    assert made.local <= 64


def test_tokens_share_a_block() -> None:
    def shape(shared: int, tokens: int, width: int = 64) -> decode_kernel.Shape:
        way = decode_kernel.shape(mx.bfloat16, width, 2 * shared, 2, tokens, FEW)
        assert way is not None
        assert (way.groups, way.parts * way.heads) == (2, shared)
        return way

    assert [shape(4, tokens).blocks(3, tokens) // 6 for tokens in (1, 2, 4, 5, 16)] == [1, 1, 1, 2, 4]
    assert [shape(shared, 1).blocks(3, 1) // 6 for shared in (1, 8, 16, 17, 20)] == [1, 1, 1, 17, 2]
    assert [shape(4, tokens).lines for tokens in (1, 2, 3, 16)] == [8, 8, 16, 16]
    assert shape(4, 1).few == 1, "shared memory for one token"
    assert shape(8, 4, 256).lines == 8, "sums of more have no room in registers"


@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 64), (mx.bfloat16, 80), (mx.float16, 320)])
def test_others_are_left_to_the_other_kernel(dtype: mx.Dtype, width: int) -> None:
    assert decode_kernel.shape(dtype, width, 8, 2, 1, FEW) is None


def test_blocks_share_a_row_where_they_are_few_or_it_is_long() -> None:
    assert decode_kernel.splits(8, 512, 4) == 8, "a tile for each warp"
    assert decode_kernel.splits(8, 16384, 4) == 32
    assert decode_kernel.splits(256, 512, 4) == 1
    assert decode_kernel.splits(1024, 16384, 4) == 8
    assert decode_kernel.splits(1024, 512, 4) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize(("shared", "width"), [(4, 64), (16, 64), (8, 128), (2, 192), (8, 256)])
def test_compiles_for_the_device(dtype: mx.Dtype, tokens: int, shared: int, width: int) -> None:
    way = decode_kernel.shape(dtype, width, 8 * shared, 8, tokens, FEW)
    assert way is not None
    for window, ring in [(0, 0), (512, 512 + 16)]:
        numbers = decode_kernel.constants(way, window, ring, (("ROTATED", width), ("TRADITIONAL", 0)))
        made = compile_kernel(
            decode_kernel.whole_header(dtype, numbers, width**-0.5),
            cuda_kernels.terse(SOURCE),
            dict(attention_kernel.types(dtype)),
            {"out": dtype, "partial": mx.float32},
        )
        assert made.registers * way.threads <= 65536 // 2, "two blocks have room on a multiprocessor"
        assert made.local <= 64, "but for the sine of large angles, nothing is kept elsewhere"
