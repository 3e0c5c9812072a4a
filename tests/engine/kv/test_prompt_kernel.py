"""The kernels for prompts compute what separate operations compute: on the host, and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine import cuda_kernels
from runner.engine.kv import prompt_kernel
from runner.engine.kv.attention_kernel import SWITCH
from runner.engine.kv.calls import Call, Launch, Planes
from runner.engine.kv.rotary import Rotation
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.launches import separately, turned
from tests.engine.kv.prompts_on_host import PromptsOnHost
from tests.engine.kv.test_attention_kernel import Geometry, rotations

Shape = tuple[int, list[int], int | None]
"""Tokens, what each row has before them, and a window."""

HERE: list[Shape] = [(17, [0], None), (70, [0, 45], None), (35, [90, 0, 7], 20), (20, [80, 62], 90)]


def call_of(
    geometry: Geometry, dtype: mx.Dtype, shape: Shape, rotation: Rotation | None, *, uneven: bool = False
) -> Call:
    """As from one product of all projections: no array is contiguous, and there are more slots than rows.

    What lies behind the rows is no number, and must not be looked at.
    """
    (heads, groups, width), (tokens, starts, window) = geometry, shape
    rows, places = len(starts), max(starts) + tokens + 3
    keys = iter(mx.random.split(mx.random.key(tokens), 3))
    draw = lambda *of: mx.random.normal(of, key=next(keys)).astype(dtype)  # noqa: E731
    projected = draw(rows, tokens, heads + 2 * groups, width).swapaxes(1, 2)
    ends = mx.array([*starts, 0])[:, None, None, None] + tokens
    behind = mx.arange(places)[:, None] >= ends
    planes = [mx.where(behind, mx.nan, draw(rows + 1, groups, places, width)).astype(dtype) for _ in range(2)]
    if uneven:  # in an order of their own, as one that was written as a whole; and lines that are not
        planes[0] = mx.contiguous(planes[0].swapaxes(1, 2)).swapaxes(1, 2)
        planes[1] = mx.contiguous(planes[1].swapaxes(2, 3)).swapaxes(2, 3)
    return Call(
        projected[:, :heads],
        *(projected[:, heads : heads + groups], projected[:, heads + groups :]),
        (planes[0], planes[1]),
        *(mx.array(starts, dtype=mx.int32), width**-0.5, window, None, None, rotation),
    )


def check(launch: Launch, calls: Iterator[Call]) -> None:
    for call in calls:
        close = {mx.bfloat16: 2e-2, mx.float16: 3e-3}[call.queries.dtype]
        expected, planes = in_float32(call)
        mx.eval(expected, planes)
        attended, written = launch(call)
        mx.eval(attended, written)
        assert attended.shape == call.queries.shape
        assert attended.dtype == call.queries.dtype
        assert mx.allclose(attended, expected, rtol=close, atol=close).item()
        rows, tokens = call.queries.shape[0], call.queries.shape[2]
        places = mx.arange(planes[0].shape[2])
        new = (places >= call.starts[:, None]) & (places < call.starts[:, None] + tokens)
        new = mx.concatenate([new, mx.zeros((planes[0].shape[0] - rows, places.size), dtype=mx.bool_)])
        for mine, other in zip(map(numbers, written), planes, strict=True):
            # A rotation's last bit may be another.
            assert mx.allclose(mine, other, rtol=close, atol=close).item(), "written in the right places"
            assert ((mine == other) | new[:, None, :, None]).all().item(), "and nowhere else"
        assert mx.array_equal(numbers(written[1]), planes[1]).item(), "values are what they are"


def in_float32(call: Call) -> tuple[mx.array, Planes]:
    """What the launches should do; the planes they are given stay as they are. On the CPU, MLX rotates in 16 bits."""
    exact = replace(call, queries=call.queries.astype(mx.float32), keys=call.keys.astype(mx.float32))
    queries, keys = (array.astype(call.queries.dtype) for array in turned(exact))
    planes = numbers(call.planes[0]), numbers(call.planes[1])
    return separately(replace(call, queries=queries, keys=keys, planes=planes, rotation=None))


def numbers(plane: mx.array) -> mx.array:
    """Zeros for what is none."""
    return mx.where(mx.isnan(plane), mx.array(0, dtype=plane.dtype), plane)


@pytest.mark.usefixtures("arrays_on_the_host")
def test_on_the_host() -> None:
    """Prompts that are no whole tiles, after others, and windows that begin in the middle of one."""
    turning = itertools.cycle([None, *rotations(32)])
    calls = (call_of((4, 2, 32), mx.bfloat16, shape, next(turning)) for shape in HERE)
    check(PromptsOnHost(warps=2), calls)


@pytest.mark.usefixtures("arrays_on_the_host")
def test_several_blocks_share_keys_on_the_host() -> None:
    """Also where there are fewer tiles of keys than blocks."""
    calls = (call_of((2, 1, 16), mx.float16, shape, None) for shape in [*HERE, (17, [300], None)])
    check(PromptsOnHost(splits=4), calls)


def test_blocks_share_keys_where_there_are_few_and_much_to_read() -> None:
    assert prompt_kernel.splits(128, 1 << 17, 256, None) == 1
    assert prompt_kernel.splits(32, 1024, 64, None) == 2
    assert prompt_kernel.splits(32, 8192, 64, None) == 4
    assert prompt_kernel.splits(32, 8192, 64, 512) == 1
    assert prompt_kernel.splits(1, 1 << 17, 64, None) == 32


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("width", [16, 80])
def test_rotations_and_planes_of_any_order_on_the_host(width: int) -> None:
    calls = (
        call_of((3, 3, width), mx.float16, (20, [3, 50], None), rotation, uneven=True) for rotation in rotations(width)
    )
    check(PromptsOnHost(), calls)


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.nightly
@pytest.mark.parametrize("geometry", [(4, 2, 64), (2, 1, 128), (3, 3, 96)], ids=str)
def test_on_the_host_as_on_the_device(geometry: Geometry) -> None:
    turning = itertools.cycle([None, *rotations(geometry[2])])
    calls = (call_of(geometry, mx.bfloat16, shape, next(turning)) for shape in [*HERE, (150, [70, 0], 65)])
    check(PromptsOnHost(prompt_kernel.WARPS), calls)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        *(((32, 8, 64), mx.bfloat16), ((8, 1, 128), mx.bfloat16), ((6, 2, 96), mx.bfloat16)),
        *(((12, 12, 80), mx.float16), ((4, 2, 16), mx.float16)),
    ],
    ids=str,
)
def test_on_the_device(geometry: Geometry, dtype: mx.Dtype) -> None:
    """Each rotation and each window takes a second to compile, so not all are tried with each geometry."""
    shapes: list[Shape] = [
        *HERE[:3],
        *((256, [0], None), (255, [0, 33], None), (300, [1000, 64, 0], None), (128, [1, 0, 700], None)),
        *((64, [6000], None), (300, [500, 0], 20), (96, [18, 19, 20], 20)),
    ]
    first, *others = rotations(geometry[2])
    turning = itertools.cycle([None, first, *(others if geometry == (32, 8, 64) else [])])
    orders = itertools.cycle([False, False, True])
    check(
        prompt_kernel.write_and_attend,
        (call_of(geometry, dtype, shape, next(turning), uneven=next(orders)) for shape in shapes),
    )


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
def test_calls_that_nobody_has_asked_for_run_in_order_on_the_device() -> None:
    """Chunks of a prompt, in one graph: each sees what those before it have written."""
    geometry, chunk, chunks = (32, 8, 64), 100, 4
    whole = call_of(geometry, mx.bfloat16, (chunk * chunks, [0], None), None)
    expected, _ = in_float32(whole)
    mx.eval(expected)
    after, parts = None, []
    for i in range(chunks):
        span = slice(i * chunk, (i + 1) * chunk)
        new = [array[:, :, span] for array in (whole.queries, whole.keys, whole.values)]
        starts = mx.array([i * chunk], dtype=mx.int32)
        after, _ = prompt_kernel.write_and_attend(
            Call(new[0], new[1], new[2], whole.planes, starts, whole.scale, None, None, after)
        )
        parts.append(after)
    assert mx.allclose(mx.concatenate(parts, axis=2), expected, rtol=2e-2, atol=2e-2).item()


def test_it_is_on_where_there_is_a_device_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(cuda_kernels, "usable", cuda_kernels.usable.__wrapped__)
    assert prompt_kernel.launch() is prompt_kernel.write_and_attend
    monkeypatch.setenv(SWITCH, "0")
    assert prompt_kernel.launch() is None


def test_what_there_are_kernels_for() -> None:
    def applies(heads: int, groups: int, tokens: int, width: int, dtype: mx.Dtype = mx.float16) -> bool:
        keys = mx.zeros((2, groups, tokens, width), dtype)
        return prompt_kernel.applies(mx.zeros((2, heads, tokens, width), dtype), keys, keys)

    assert applies(4, 2, 17, 128)
    assert applies(4, 4, 4000, 80, mx.bfloat16)
    assert not applies(4, 2, 16, 64), "those are attention_kernel's"
    assert not applies(4, 2, 17, 64, mx.float32)
    assert not applies(4, 3, 17, 64)
    assert not applies(4, 2, 17, 72)
    assert not applies(4, 2, 17, 144)


def test_a_block_has_room_on_the_device() -> None:
    for width in range(16, 129, 16):
        assert prompt_kernel.shared_memory(width) <= 227 * 1024
        assert 128 < prompt_kernel.lines(width) * width // 2 <= 256


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("window", [0, 512])
def test_compiles_for_the_device(dtype: mx.Dtype, width: int, window: int) -> None:
    types = {"starts": mx.int32, "counters": mx.int32, "frequencies": mx.float32}
    arrays = {name: types.get(name, dtype) for name in prompt_kernel.ATTEND_INPUTS}
    header = prompt_kernel.attend_header(dtype, width, window, width**-0.5)
    needs = compile_kernel(
        header, cuda_kernels.terse(prompt_kernel.ATTEND), arrays, {"out": dtype, "partial": mx.float32}
    )
    assert needs.local == 0, "nothing has to be put aside"
    assert needs.registers <= (128 if width == 64 else 168)
    arrays = {name: types.get(name, dtype) for name in prompt_kernel.WRITE_INPUTS}
    header = prompt_kernel.write_header(dtype, width, width, 0, prompt_kernel.lines(width))
    needs = compile_kernel(header, cuda_kernels.terse(prompt_kernel.WRITE), arrays, {"rotated": dtype})
    assert needs.local == 0
    assert needs.registers <= 64
