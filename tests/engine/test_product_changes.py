"""The product of few tokens with each row's change in it: on the host, compiled for a GPU, and on one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu

from runner.engine import product_kernel
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import TILES, Changed, Way
from runner.engine.product_shapes import Kernels, Shapes
from tests.engine.adapters.stacks import draw, of_two_parts, stacked, weight_of
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.product_on_host import OnHost
from tests.engine.test_product_kernel import DTYPES, EPILOGUES, SHAPES, WHAT, exact

Make = Callable[[int, int, mx.Dtype, str, product_kernel.Choose], Changed]

ROWS = [0, 1, 2, 3, 4, 2]
"""Slots of a batch."""


def changes(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Stack:
    """One slot has more ranks than a block computes."""
    most = (16, 8) if epilogue == "swiglu" else (11, 8)
    return of_two_parts(outputs, inputs, dtype, epilogue, most)


def expected(
    x: mx.array, weight: mx.array, added: mx.array, stack: Stack, slots: list[int], epilogue: str
) -> np.ndarray:  # type: ignore[type-arg]
    y = exact(x) @ exact(weight).T
    for row, slot in enumerate(slots):
        y[row] += exact(x[row]) @ exact(stack.down[slot]).T @ exact(stack.b[slot])
    if epilogue == "swiglu":
        gate, up = np.split(y, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up
    return y + exact(added) if epilogue == "add" else y


def check(
    make: Make,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way | None = None,
    tokens_a_row: tuple[int, ...] = (1, 5),
) -> None:
    """Against float64; and a row alone gives the bits that it gives among others."""
    choose = product_kernel.way if way is None else lambda *_: way
    changed = make(outputs, inputs, dtype, "plain" if epilogue == "add" else epilogue, choose)
    stack = changes(outputs, inputs, dtype, epilogue)
    weight = weight_of(outputs, inputs, dtype, epilogue)
    for tokens in tokens_a_row:
        shape = (len(ROWS), tokens)
        x, added = (mx.random.normal((*shape, of), key=mx.random.key(of)).astype(dtype) for of in (inputs, outputs))

        def of(rows: list[int], x: mx.array = x, added: mx.array = added) -> mx.array:
            at = mx.array(rows)
            slots = RowSlots.of([ROWS[row] for row in rows])
            return changed(x[at], weight, added[at] if epilogue == "add" else None, stack, slots)

        whole = of([*range(len(ROWS))])
        close = 4e-2 if dtype == mx.bfloat16 else 6e-3
        np.testing.assert_allclose(
            exact(whole), expected(x, weight, added, stack, ROWS, epilogue), rtol=close, atol=close
        )
        for rows in ([1], [5, 4, 2]):
            assert mx.array_equal(of(rows), whole[mx.array(rows)]).item(), rows


@pytest.fixture(scope="module")
def on_host() -> Make:
    return OnHost().changed


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "way", "tokens"),
    [
        (32, 192, mx.bfloat16, "plain", Way(2, 2, 1), 1),
        (64, 320, mx.float16, "add", Way(4, 1, 2), 1),  # more warps than the smallest change has ranks
        (16, 128, mx.bfloat16, "swiglu", Way(2, 1, 2), 5),
    ],
    ids=str,
)
def test_on_the_host(
    on_host: Make, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, way: Way, tokens: int
) -> None:
    check(on_host, outputs, inputs, dtype, epilogue, way, (tokens,))


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
def test_on_the_host_with_many_warps(on_host: Make, dtype: mx.Dtype, epilogue: str) -> None:
    check(on_host, 64, 640, dtype, epilogue, Way(8, 2, 2))


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (64, 64), (2048, 8192), (8192, 1088), (3072, 2048)])
def test_on_the_device(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    check(product_kernel.changed, outputs, inputs, dtype, epilogue)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_long_chain_is_that_of_separate_launches_on_the_device(rows: int, rank: int) -> None:
    """Products that follow each other at once, with the counters of a model call, a hundred times over."""
    width, inner, dtype = 2048, 4096, mx.bfloat16
    up, down = draw((2 * inner, width), 1, dtype) * 2, draw((width, inner), 2, dtype)
    stacks = [
        stacked(width, [[(inner, rank), (inner, 2)], [(inner, 3), (inner, rank)], []], dtype),
        stacked(inner, [[(width, rank)], [(width, 5)], []], dtype),
    ]
    gated = product_kernel.changed(inner, width, dtype, "swiglu")
    plain = product_kernel.changed(width, inner, dtype)
    slots = RowSlots.of([row % 4 for row in range(rows)])
    x = mx.random.normal((rows, 1, width), key=mx.random.key(3)).astype(dtype)
    mx.eval(up, down, x, slots.arrays, [stack.arrays for stack in stacks])

    def chain(steps: int) -> list[mx.array]:
        y, all_of_them = x, []
        for _ in range(steps):
            h = mx.fast.rms_norm(y, None, 1e-6)
            y = plain(gated(h, up, None, stacks[0], slots), down, y, stacks[1], slots)
            all_of_them.append(y)
        return all_of_them

    def apart(y: mx.array) -> mx.array:
        h = mx.fast.rms_norm(y, None, 1e-6)
        both = kernel.add_changes(h, h @ up.T, stacks[0], slots.board())
        between = swiglu(*mx.split(both, 2, axis=-1))
        return y + kernel.add_changes(between, between @ down.T, stacks[1], slots.board())

    first = chain(100)
    mx.eval(first)
    for before, after in itertools.pairwise([x, *first[:10]]):
        close = mx.linalg.norm((after - apart(before)).astype(mx.float32))
        assert (close <= 0.01 * mx.linalg.norm(after.astype(mx.float32))).item()
    for _ in range(20):
        again = chain(100)
        mx.eval(again)
        assert all(mx.array_equal(one, other).item() for one, other in zip(first, again, strict=True))
    assert not any(board.flatten()[:32].any().item() for board in slots.boards)


def test_what_there_is_a_kernel_for() -> None:
    stack = changes(64, 128, mx.bfloat16, "plain")
    assert product_kernel.fits_changes(64, 128, mx.bfloat16, stack)
    assert not product_kernel.fits_changes(64, 128, mx.float16, stack)
    assert not product_kernel.fits_changes(64, 192, mx.bfloat16, stack)
    narrow = stacked(128, [[(24, 4), (40, 4)]], mx.bfloat16)
    assert not product_kernel.fits_changes(64, 128, mx.bfloat16, narrow), "a part ends within a tile"
    normed = Stack(stack.down, stack.b, mx.ones(stack.b.shape[::2]), stack.spans)
    assert not product_kernel.fits_changes(64, 128, mx.bfloat16, normed), "DoRA"


def test_the_wide_product_has_the_changes_of_few_tokens_too() -> None:
    """Where it fits them: a row has the same bits then in any batch of up to 128."""
    outputs, inputs, dtype = 64, 128, mx.bfloat16
    weight, stack = weight_of(outputs, inputs, dtype, "plain"), changes(outputs, inputs, dtype, "plain")

    def spelled(*_: object) -> Changed:
        def call(x: mx.array, w: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            return x @ w.T + (x @ stack.a[slots.slots]) @ stack.b[slots.slots]

        return call

    def product(*_: object) -> product_kernel.Multiply:
        return lambda x, w, added=None: x @ w.T

    few, wide = (lambda *given: spelled(*given)), (lambda *given: spelled(*given))
    for fits in (True, False):
        kernels = Kernels(product, few, wide=product, wide_changed=((wide, lambda *_, fits=fits: fits),))
        shape = Shapes(kernels).plain(weight)
        assert shape is not None
        shape.prepare(weight, stack)
        taken = [shape.changed(mx.zeros((rows, 1, inputs), dtype), stack) for rows in (1, 17, 32, 33, 128)]
        assert None not in taken[:3]
        assert (len(set(taken)) == 1) == fits
        assert (taken[4] is not None) == fits


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_compiles_for_the_device(dtype: mx.Dtype, epilogue: str) -> None:
    arrays = dict.fromkeys(product_kernel.inputs_of(epilogue, changes=True), dtype) | {"board": mx.int32}
    ways = {(product_kernel.way(*shape, tiles, epilogue), tiles) for shape, tiles in itertools.product(SHAPES, TILES)}
    for way, tiles in ways:
        header = product_kernel.header(way, tiles, dtype, epilogue, changes=True)
        source = product_kernel.source(epilogue, changes=True)
        needs = compile_kernel(header, source, arrays, {"out": dtype})
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers * way.warps * 32 <= 65536
