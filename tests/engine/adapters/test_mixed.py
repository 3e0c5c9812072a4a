"""Rows of one call with different adapters, whichever way their changes are added."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from runner.engine.adapters import mixed
from runner.engine.adapters.layers import AdaptedLinear, CurrentSlots, RowSlots
from runner.engine.adapters.mixed import Way
from runner.engine.adapters.stack import Change, Stack
from tests.engine.adapters.stacks import draw, joined, stacked
from tests.engine.operations import VIEWS, operations, with_views

INPUTS, OUTPUTS = 48, 40
CLOSE: dict[str, float] = {"rtol": 1e-2, "atol": 3e-3} if mx.cuda.is_available() else {"rtol": 1e-4, "atol": 1e-5}
"""A GPU's products of float32 are of 19 bits (TF32)."""

WAYS: tuple[Way, ...] = ("together", "copied", "gathered")
SLOTS = [2, 0, 3, 1, 2]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    monkeypatch.setattr(mixed, "way", lambda *_: request.param)
    way: Way = request.param
    return way


def of_ranks(*ranks: int, dtype: mx.Dtype = mx.float32, outputs: int = OUTPUTS) -> Stack:
    stack = stacked(INPUTS, [[(outputs, rank)] for rank in ranks], dtype)
    mx.eval(stack.arrays)
    return stack


def layer(stack: Stack, slots: list[int], base: nn.Module | None = None) -> AdaptedLinear:
    current = CurrentSlots()
    made = AdaptedLinear(base or nn.Linear(INPUTS, OUTPUTS, bias=False), current)
    made.stack, current.rows = stack, RowSlots.of(slots)
    mx.eval(made.parameters())
    return made


def expected(made: AdaptedLinear, x: mx.array, slots: list[int]) -> np.ndarray:
    """In 64 bits, row by row; x is [rows, …, in]."""
    stack, wide = made.stack, lambda array: np.array(array.astype(mx.float32), dtype=np.float64)
    assert stack is not None
    bias = wide(made.base.bias) if "bias" in made.base else 0.0
    found = []
    for row, slot in zip(wide(x), slots, strict=True):
        weight = wide(made.base.weight).T + wide(stack.down[slot]).T @ wide(stack.b[slot])
        factor = 1.0 if stack.magnitude is None else wide(stack.magnitude[slot])
        found.append(row @ weight * factor + bias)
    return np.stack(found)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2), "flat"], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_each_row_has_its_own_change(shape: tuple[int, ...] | str, bias: bool, dora: bool) -> None:
    stack = of_ranks(4, 2, 3)
    if dora:
        scaled = Change(draw((INPUTS, 5), 8, mx.float32), draw((5, OUTPUTS), 9, mx.float32), None, ((OUTPUTS, 0, 5),))
        factor = mx.random.uniform(0.5, 2.0, (OUTPUTS,), key=mx.random.key(4))
        stack = of_ranks(4, 2).appended(Change(scaled.a, scaled.b, factor, scaled.spans))
    made = layer(stack, SLOTS, nn.Linear(INPUTS, OUTPUTS, bias=bias))
    x = draw((len(SLOTS), *((7,) if isinstance(shape, str) else shape), INPUTS), 3, mx.float32)
    given = x.flatten(0, 1) if shape == "flat" else x
    found = made(given)
    assert found.shape == (*given.shape[:-1], OUTPUTS)
    np.testing.assert_allclose(np.array(found).reshape(*x.shape[:-1], OUTPUTS), expected(made, x, SLOTS), **CLOSE)


@pytest.mark.usefixtures("way")
def test_quantised_bases(way: Way) -> None:
    base = nn.QuantizedLinear(64, OUTPUTS, bias=False, group_size=32, bits=4)
    stack = stacked(64, [[(OUTPUTS, 4)], [(OUTPUTS, 2)]], mx.float32)
    made = layer(stack, [1, 2, 0], base)
    x = draw((3, 5, 64), 3, mx.float32)
    change = np.array(x) @ np.array(stack.a[mx.array([1, 2, 0])]) @ np.array(stack.b[mx.array([1, 2, 0])])
    np.testing.assert_allclose(np.array(made(x)), np.array(base(x)) + change, **CLOSE)


@pytest.mark.parametrize("way", ["together", "copied"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_16_bits(monkeypatch: pytest.MonkeyPatch, way: Way, dtype: mx.Dtype) -> None:
    """Which have all slots' changes in one array. MLX's gathering product has only 32 on the CPU."""
    monkeypatch.setattr(mixed, "way", lambda *_: way)
    stack = of_ranks(4, 2, 3, dtype=dtype)
    assert stack.packed is not None
    base = nn.Linear(INPUTS, OUTPUTS, bias=False)
    base.set_dtype(dtype)
    made, x = layer(stack, SLOTS, base), draw((len(SLOTS), 6, INPUTS), 3, dtype)
    found = made(x)
    assert found.dtype == dtype
    close = 3e-2 if dtype == mx.bfloat16 else 4e-3
    np.testing.assert_allclose(
        np.array(found.astype(mx.float32)), expected(made, x, SLOTS), rtol=close, atol=close * 0.3
    )


@pytest.mark.parametrize("value", [mx.inf, mx.nan, 3e38])
@pytest.mark.usefixtures("way")
def test_what_other_slots_make_of_a_row_is_left_out(value: float) -> None:
    """Also where it is too large for the type, or no number."""
    stack = of_ranks(4, 2, 3)
    down = mx.array(stack.down)
    down[3] = value
    broken = Stack.of(down, stack.b, None, stack.spans)
    x = 100 * mx.abs(draw((len(SLOTS), 6, INPUTS), 3, mx.float32))
    base = nn.Linear(INPUTS, OUTPUTS, bias=False)
    found, whole = layer(broken, SLOTS, base)(x), layer(stack, SLOTS, base)(x)
    for row, slot in enumerate(SLOTS):
        assert mx.all(mx.isfinite(found[row])).item() == (slot != 3)
        assert slot == 3 or mx.array_equal(found[row], whole[row])


@pytest.mark.usefixtures("way")
def test_no_row_is_changed_by_what_another_holds() -> None:
    made, x = layer(of_ranks(4, 2, 3), SLOTS), draw((len(SLOTS), 6, INPUTS), 3, mx.float32)
    before = made(x)
    x[1], x[4] = mx.nan, mx.inf
    for row in (0, 2, 3):
        assert mx.array_equal(made(x)[row], before[row])


@pytest.mark.usefixtures("way")
def test_rows_go_on_while_slots_come_and_go() -> None:
    """Slots that come leave the rows' numbers as they are; where one goes, rows get new ones."""
    stack = of_ranks(4, 2)
    made, x = layer(stack, [1, 0, 2]), draw((3, 6, INPUTS), 3, mx.float32)
    before = made(x)
    mx.eval(before)
    for rank, slots in ((7, 4), (1, 5)):
        stack = made.stack = stack.appended(joined(INPUTS, [(OUTPUTS, rank)], 99 + rank, mx.float32))
        assert stack.down.shape[:2] == (slots, 7)
        assert mx.allclose(made(x), before, **CLOSE)
    made.stack = stack.without(1, 7)
    made._current.rows = RowSlots.of([0, 0, 1])
    assert mx.allclose(made(x)[1:], before[1:], **CLOSE)
    assert mx.array_equal(made(x)[0], made.base(x)[0])


@pytest.mark.usefixtures("way")
def test_a_kept_graph_takes_other_slots(way: Way) -> None:
    made, x = layer(of_ranks(4, 2, 3), SLOTS), draw((len(SLOTS), 6, INPUTS), 3, mx.float32)

    def call(x: mx.array, arrays: list[mx.array]) -> mx.array:
        made._current.rows = RowSlots.of_arrays(arrays, None)
        return made(x)

    graph = mx.compile(call)
    for slots in (SLOTS, [0, 1, 1, 3, 0], [3, 3, 2, 2, 1]):
        found = graph(x, RowSlots.of(slots).arrays)
        np.testing.assert_allclose(np.array(found), expected(made, x, slots), **CLOSE)


# ------------------------------------------------------------- what it costs


def counted(scratch: Path, made: AdaptedLinear, tokens: int) -> dict[str, int]:
    """Operations of a call beyond those of its base, once what rows share is there."""
    x = draw((len(SLOTS), tokens, INPUTS), 3, made.base.weight.dtype)
    mx.eval(made(x))
    found = operations(scratch, made(x))
    found.subtract(operations(scratch, made.base(x)))
    return {name: count for name, count in found.items() if count}


def test_on_the_cpu_a_change_is_two_products_and_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted, cast or turned for each layer."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    made = layer(of_ranks(8, 4, 4), SLOTS)
    assert counted(tmp_path, made, 1) == {"GatherMM": 2, "Add": 1}
    x = mx.zeros((len(SLOTS), 1, INPUTS))
    apart = with_views(tmp_path, made(x)) - with_views(tmp_path, made.base(x))
    assert not apart.keys() & VIEWS


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    ("rank", "slots", "few"), [(8, 9, True), (64, 4, True), (32, 9, False), (512, 1, True), (136, 2, False)]
)
def test_on_cuda_all_slots_are_multiplied_at_once_where_their_ranks_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int, slots: int, few: bool
) -> None:
    """And one adapter's always: its rows would have to be multiplied by as many. Nothing is copied then; else, where
    rows have several tokens, each row's matrices are."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    if tokens > 1:
        monkeypatch.setattr(mx, "gather_mm", None)
    made = layer(of_ranks(*[rank] * slots), [slot % (slots + 1) for slot in range(len(SLOTS))])
    many = {"Gather": 2, "Matmul": 1, "AddMM": 1} if tokens > 1 else {"GatherMM": 2, "Add": 1}
    assert counted(tmp_path, made, tokens) == ({"Matmul": 1, "Select": 1, "AddMM": 1} if few else many)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_slots_side_by_side_take_no_memory(dtype: mx.Dtype) -> None:
    stack = of_ranks(16, 8, 16, dtype=dtype, outputs=4096)
    held, before = stack.nbytes, mx.get_active_memory()
    a, b = stack.beside
    mx.eval(a, b)
    assert (a.shape, b.shape) == ((INPUTS, 48), (48, 4096))
    assert mx.get_active_memory() <= before
    assert stack.nbytes == held
    assert stack.beside[0] is a
    assert mx.array_equal(a[:, 16:24], stack.a[2][:, :8])
    assert mx.array_equal(b[16:24], stack.b[2][:8])
