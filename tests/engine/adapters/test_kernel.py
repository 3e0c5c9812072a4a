"""The launch that adds rows' changes to a product, and what follows it: on the host, compiled for a GPU, and on one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu

from runner.engine import cuda_kernels, product_kernel
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import ROOM, RowSlots, boards_of
from runner.engine.adapters.stack import LINE, Stack
from runner.engine.product_source import GATE, SWIGLU
from tests.engine.adapters.changes_on_host import ChangesOnHost
from tests.engine.adapters.stacks import draw, stacked
from tests.engine.cuda_compiler import compile_kernel

AddChanges = Callable[[mx.array, mx.array, Stack, RowSlots, mx.array | None, str], mx.array]

DTYPES = [mx.bfloat16, mx.float16]
SLOTS = [0, 1, 2, 3, 4, 2]
needs_device = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA device")


def changes(inputs: int, outputs: list[int], dtype: mx.Dtype) -> Stack:
    """Slots: none, a rank, more ranks than a block has warps, none in one part, nothing."""
    ranks = [[3] * len(outputs), [17] * len(outputs), [0, *[5] * (len(outputs) - 1)]]
    return stacked(inputs, [*([*zip(outputs, each, strict=True)] for each in ranks), []], dtype)


def check(add_changes: AddChanges, inputs: int, outputs: list[int], dtype: mx.Dtype, tokens: int) -> None:
    """Against float32; and what follows is to the bit what it is apart."""
    stack, rows = changes(inputs, outputs, dtype), RowSlots.of(SLOTS)
    x, y = (mx.random.normal((6, tokens, of), key=mx.random.key(of)).astype(dtype) for of in (inputs, sum(outputs)))
    found = add_changes(x, y, stack, rows, None, "plain")
    for row, slot in enumerate(SLOTS):
        a, b, _ = stack.slot(slot)
        exact = y[row].astype(mx.float32) + (x[row].astype(mx.float32) @ a.astype(mx.float32)) @ b.astype(mx.float32)
        assert mx.allclose(found[row].astype(mx.float32), exact, rtol=2e-2, atol=2e-2), (row, slot)
    assert mx.array_equal(found[0], y[0])
    assert not mx.allclose(found[1], y[1], rtol=5e-2, atol=5e-2)
    assert mx.array_equal(add_changes(x, y, stack, rows, 3 * y, "plain"), 3 * y + found)


def draws(dtype: mx.Dtype) -> tuple[mx.array, mx.array, Stack]:
    """Tokens, and the product and the changes of an MLP's gate and input."""
    inputs, between = 64, 144
    stack = changes(inputs, [between, between], dtype)
    return draw((6, 2, inputs), 1, dtype) * 8, draw((6, 2, 2 * between), 2, dtype) * 8, stack


@pytest.fixture(scope="module")
def on_host() -> ChangesOnHost:
    return ChangesOnHost()


@pytest.mark.parametrize(
    ("outputs", "dtype", "tokens"), [([136, 64], mx.bfloat16, 1), ([72], mx.float16, 3), ([64] * 3, mx.bfloat16, 2)]
)
def test_on_the_host(on_host: ChangesOnHost, outputs: list[int], dtype: mx.Dtype, tokens: int) -> None:
    check(on_host, 328, outputs, dtype, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_on_the_host(on_host: ChangesOnHost, dtype: mx.Dtype) -> None:
    x, y, stack = draws(dtype)
    rows = RowSlots.of(SLOTS)
    changed = on_host(x, y, stack, rows, None, "plain")
    gated = on_host.gate(changed)
    assert mx.array_equal(on_host(x, y, stack, rows, None, "swiglu"), gated)
    gate, up = (np.array(part.astype(mx.float32)) for part in mx.split(changed, 2, axis=-1))
    close = 2e-2 if dtype == mx.bfloat16 else 3e-3
    np.testing.assert_allclose(
        np.array(gated.astype(mx.float32)), gate / (1 + np.exp(-gate)) * up, rtol=close, atol=close
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["plain", "swiglu"])
def test_compiles_for_the_device(dtype: mx.Dtype, epilogue: str) -> None:
    inputs = dict.fromkeys(kernel.inputs_of(epilogue), dtype) | {"board": mx.int32}
    needs = compile_kernel(kernel.header(dtype, epilogue), kernel.source(epilogue), inputs, {"out": dtype})
    assert needs.local == 0, "nothing has to be put aside"
    assert needs.registers * 512 <= 65536


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_compiles_for_the_device(dtype: mx.Dtype) -> None:
    needs = compile_kernel(product_kernel.gate_header(dtype) + SWIGLU, GATE, {"y": dtype}, {"out": dtype})
    assert needs.local == 0


def on_device(
    x: mx.array, y: mx.array, stack: Stack, rows: RowSlots, added: mx.array | None, epilogue: str
) -> mx.array:
    assert kernel.applies(x, stack)
    return kernel.add_changes(x, y, stack, rows.board(), added, epilogue)


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.SWITCH, "1")
    cuda_kernels.usable.cache_clear()


@needs_device
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("outputs", [[2048], [2048, 512, 512], [8192, 8192], [64]], ids=str)
def test_on_the_device(outputs: list[int], tokens: int, dtype: mx.Dtype) -> None:
    check(on_device, 512, outputs, dtype, tokens)


@needs_device
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_is_the_separate_operations_on_the_device(dtype: mx.Dtype) -> None:
    x, y, stack = draws(dtype)
    rows = RowSlots.of(SLOTS)
    changed = on_device(x, y, stack, rows, None, "plain")
    separately = swiglu(*mx.split(changed, 2, axis=-1))
    assert mx.array_equal(on_device(x, y, stack, rows, None, "swiglu"), separately)
    assert mx.array_equal(product_kernel.gate(changed), separately)


# ------------------------------------------------------------- what a launch finds in its arrays


@pytest.mark.parametrize("parts", [1, 3])
def test_changes_are_one_array(parts: int) -> None:
    stack = changes(64, [32] * parts, mx.bfloat16)
    for kept in (stack, stack.without(2, 5 * parts)):
        assert kept.packed is not None
        slots, ranks, inputs = kept.down.shape
        assert kept.packed.shape == (slots, LINE + ranks * (inputs + kept.b.shape[2]))
        flat = kept.packed.flatten()
        lines, first, second = flat[: slots * LINE], slots * LINE, slots * (LINE + ranks * inputs)
        spans = lines.view(mx.int32).reshape(slots, -1)[:, : 3 * parts].reshape(slots, parts, 3)
        assert spans.tolist() == [[[*span] for span in each] for each in kept.spans]
        assert mx.array_equal(flat[first:second], kept.down.flatten())
        assert mx.array_equal(flat[second:], kept.b.flatten())


def test_changes_take_no_more_memory_than_their_matrices() -> None:
    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("rooms are rounded up there")
    before = mx.get_active_memory()
    stack = stacked(1024, [[(1024, 8)]], mx.bfloat16)
    mx.eval(stack.arrays)
    taken = mx.get_active_memory() - before
    assert stack.nbytes <= taken < 1.2 * stack.nbytes


@pytest.mark.parametrize("kind", ["experts", "DoRA", "float32"])
def test_what_no_kernel_takes_is_not_packed(kind: str) -> None:
    shape = (2, 3, 4, 64) if kind == "experts" else (2, 4, 64)
    zeros = mx.zeros(shape, mx.float32 if kind == "float32" else mx.bfloat16)
    magnitude = mx.ones((2, 64), mx.bfloat16) if kind == "DoRA" else None
    stack = Stack.of(zeros, zeros, magnitude, (((64, 0, 0),), ((64, 0, 4),)))
    assert stack.packed is None
    assert not kernel.fits(mx.zeros((2, 1, 64), zeros.dtype), stack)


@pytest.mark.parametrize("rows", [1, 7, 32, 100])
def test_boards(rows: int) -> None:
    numbers = [row % 5 for row in range(rows)]
    boards = boards_of(numbers)
    for board in boards:
        assert board.shape[0] == rows
        flat = board.flatten()
        assert not flat[:32].any()
        assert flat[32 : 32 + rows].tolist() == numbers
        assert flat.size >= 32 + -(-rows // 32) * 32 + ROOM
    assert len({_address(board) for board in boards}) == len(boards), "each is memory of its own"


def _address(array: mx.array) -> int:
    mx.eval(array)
    return int(np.array(array, copy=False).ctypes.data)


def test_tokens_that_no_launch_takes() -> None:
    stack = changes(64, [32], mx.bfloat16)
    assert kernel.fits(mx.zeros((6, 8, 64), mx.bfloat16), stack)
    for x in (
        mx.zeros((6, 9, 64), mx.bfloat16),
        mx.zeros((6, 64), mx.bfloat16),
        mx.zeros((6, 1, 64), mx.float16),
    ):
        assert not kernel.fits(x, stack)
    assert not kernel.fits(mx.zeros((6, 1, 64), mx.bfloat16), changes(64, [36, 28], mx.bfloat16))
