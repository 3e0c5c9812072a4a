"""The product of 33 to 128 tokens with each row's change: on the host, compiled for a GPU, and on one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace

from runner.engine import cuda_kernels, wide_changed_kernel, wide_changes, wide_product_kernel
from runner.engine.adapters import expand, kernel
from runner.engine.adapters.layers import RowSlots, boards_of
from runner.engine.adapters.stack import Stack
from runner.engine.cuda_kernels import PROCESSORS
from runner.engine.product_kernel import Changed
from runner.engine.wide_product_kernel import Way
from tests.engine.adapters.changes_on_host import ChangesOnHost
from tests.engine.adapters.stacks import draw, of_two_parts, stacked, weight_of
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.test_product_changes import expected
from tests.engine.test_product_kernel import DTYPES, EPILOGUES, WHAT, exact
from tests.engine.wide_changes_on_host import TILED, WideChangesOnHost

CHOOSE = tuple(choose for choose, _ in wide_changed_kernel.WAYS)

Make = Callable[[int, int, mx.Dtype, str, wide_product_kernel.Choose], Changed]


def changes(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Stack:
    """One slot has more ranks than are loaded at once."""
    most = (12, 8) if epilogue == "swiglu" else (11, 9)
    return of_two_parts(outputs, inputs, dtype, epilogue, most)


def slots_of(rows: int) -> list[int]:
    return [row * 3 % 7 % 5 for row in range(rows)]


def check(
    make: Make,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    choose: wide_product_kernel.Choose,
    batches: tuple[tuple[int, int], ...],
) -> None:
    """Against float64; a row gives the same bits whatever is beside it, and so does one without changes."""
    changed = make(outputs, inputs, dtype, "plain" if epilogue == "add" else epilogue, choose)
    stack = changes(outputs, inputs, dtype, epilogue)
    weight = weight_of(outputs, inputs, dtype, epilogue)
    close = 4e-2 if dtype == mx.bfloat16 else 6e-3
    most = max(rows * tokens for rows, tokens in batches)
    all_x, all_added = (mx.random.normal((most, of), key=mx.random.key(of)).astype(dtype) for of in (inputs, outputs))
    alone: dict[tuple[int, int], mx.array] = {}
    for rows, tokens in batches:
        x = all_x[: rows * tokens].reshape(rows, tokens, -1)
        added = all_added[: rows * tokens].reshape(rows, tokens, -1)
        slots = slots_of(rows)
        found = changed(x, weight, added if epilogue == "add" else None, stack, RowSlots.of(slots))
        assert found.shape == (rows, tokens, outputs)
        np.testing.assert_allclose(
            exact(found), expected(x, weight, added, stack, slots, epilogue), rtol=close, atol=close
        )
        flat = found.reshape(rows * tokens, -1)
        for place in range(rows * tokens):
            key = (place, slots[place // tokens])
            assert mx.array_equal(alone.setdefault(key, flat[place]), flat[place]).item(), key


@pytest.fixture(scope="module")
def on_host() -> WideChangesOnHost:
    return WideChangesOnHost()


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "way", "batches"),
    [
        (448, 320, mx.bfloat16, "plain", Way(1, 4, 1, 2), ((40, 1),)),  # two blocks of ranks
        (448, 256, mx.float16, "add", Way(1, 6, 2, 4), ((20, 2), (65, 1))),
        (256, 192, mx.bfloat16, "swiglu", Way(2, 5, 1, 3), ((34, 1),)),
    ],
    ids=str,
)
def test_on_the_host(
    on_host: WideChangesOnHost,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way,
    batches: tuple[tuple[int, int], ...],
) -> None:
    check(on_host.changed, outputs, inputs, dtype, epilogue, lambda *_: way, batches)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize("way", [Way(1, 8, 4, 5), Way(2, 6, 1, 1), Way(2, 6, 2, 2)], ids=str)
def test_on_the_host_in_all_ways(on_host: WideChangesOnHost, dtype: mx.Dtype, epilogue: str, way: Way) -> None:
    check(on_host.changed, 512, 640, dtype, epilogue, lambda *_: way, ((40, 1), (20, 2), (128, 1)))


AT_ONCE = [
    (512, 320, mx.bfloat16, "plain", Way(1, 5, 1, 2), ((40, 1),)),  # two blocks of ranks
    (512, 256, mx.float16, "add", Way(2, 4, 2, 4), ((20, 2), (65, 1))),
    (256, 192, mx.bfloat16, "swiglu", Way(2, 5, 1, 3), ((34, 1),)),
    (256, 192, mx.float16, "swiglu", Way(2, 4, 1, 1), ((33, 1),)),
]


def compare(
    on_host: WideChangesOnHost,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way,
    batches: tuple[tuple[int, int], ...],
) -> None:
    """One launch gives what two do, to the bit."""
    choose, kind = lambda *_: way, "plain" if epilogue == "add" else epilogue
    one, two = (make(outputs, inputs, dtype, kind, choose) for make in (on_host.at_once, on_host.changed))
    stack, weight = changes(outputs, inputs, dtype, epilogue), draw((outputs * kernel.parts(kind), inputs), 1, dtype)
    for rows, tokens in batches:
        x, added = (
            mx.random.normal((rows, tokens, of), key=mx.random.key(of)).astype(dtype) for of in (inputs, outputs)
        )
        more, slots = added if epilogue == "add" else None, RowSlots.of(slots_of(rows))
        assert mx.array_equal(one(x, weight, more, stack, slots), two(x, weight, more, stack, slots)).item()


@pytest.mark.parametrize(("outputs", "inputs", "dtype", "epilogue", "way", "batches"), AT_ONCE, ids=str)
def test_one_launch_gives_what_two_do(
    on_host: WideChangesOnHost,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way,
    batches: tuple[tuple[int, int], ...],
) -> None:
    compare(on_host, outputs, inputs, dtype, epilogue, way, batches)


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "way", "batches"),
    [
        (512, 256, mx.float16, "add", Way(1, 8, 2, 4), ((20, 2), (128, 1))),
        (256, 192, mx.bfloat16, "swiglu", Way(2, 6, 1, 3), ((34, 1),)),
    ],
    ids=str,
)
def test_one_launch_has_changes_where_chunks_were(
    monkeypatch: pytest.MonkeyPatch,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way,
    batches: tuple[tuple[int, int], ...],
) -> None:
    """If there is no room beside those."""
    monkeypatch.setattr(wide_changed_kernel, "beside", lambda *_: 0)
    compare(WideChangesOnHost(), outputs, inputs, dtype, epilogue, way, batches)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize("way", [Way(1, 8, 4, 5), Way(2, 6, 1, 1), Way(2, 6, 2, 16)], ids=str)
def test_one_launch_on_the_host_in_all_ways(
    on_host: WideChangesOnHost, dtype: mx.Dtype, epilogue: str, way: Way
) -> None:
    check(on_host.at_once, 512, 1088, dtype, epilogue, lambda *_: way, ((40, 1), (20, 2), (128, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("tiled", [False, True], ids=["by vector", "tiled"])
def test_what_follows_is_what_add_changes_gives(
    on_host: WideChangesOnHost, add_changes: ChangesOnHost, dtype: mx.Dtype, epilogue: str, tiled: bool
) -> None:
    """To the bit, given the same inner products: those of whole numbers are exact in any order."""
    outputs, inputs, rows, way = 192 if tiled else 272, 64, 18, TILED if tiled else None
    stack = changes(outputs, inputs, dtype, epilogue)
    whole = mx.round(stack.down.astype(mx.float32) * 16).astype(dtype)
    stack = Stack.of(whole, stack.b, None, stack.spans)
    x = mx.random.randint(-4, 5, (rows, 2, inputs), key=mx.random.key(1)).astype(dtype)
    y = mx.random.normal((rows, 2, outputs * kernel.parts(epilogue)), key=mx.random.key(2)).astype(dtype)
    added = None if epilogue == "swiglu" else 3 * y
    inner = mx.einsum("bk,srk->bsr", x.flatten(0, 1).astype(mx.float32), whole.astype(mx.float32))
    pieces = mx.stack([inner - 7, mx.full(inner.shape, 3.0), mx.full(inner.shape, 4.0)])
    slots = RowSlots.of(slots_of(rows))
    for more in (None, added):
        found = on_host.expand(y, pieces, stack, slots, more, epilogue, way)
        assert mx.array_equal(found, add_changes(x, y, stack, slots, more, epilogue)).item()


@pytest.fixture(scope="module")
def add_changes() -> ChangesOnHost:
    return ChangesOnHost()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_what_follows_compiles_for_the_device(dtype: mx.Dtype, epilogue: str) -> None:
    for way in (expand.BY_VECTOR_WAY[epilogue], expand.TILED_WAY):
        header, source = expand.header(dtype, epilogue, way), expand.source(epilogue, way)
        needs = compile_kernel(header, source, expand.inputs_of(epilogue, dtype), {"out": dtype})
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers <= 128, "as many threads as possible wait at once"


def test_what_there_is_a_kernel_for() -> None:
    stack = changes(512, 128, mx.bfloat16, "plain")  # 5 slots of 20 ranks
    assert wide_changes.fits(512, 128, mx.bfloat16, "plain", stack)
    assert not wide_changes.fits(512, 128, mx.float16, "plain", stack)
    assert not wide_changes.fits(512, 192, mx.bfloat16, "plain", stack)
    assert not wide_changes.fits(256, 128, mx.bfloat16, "swiglu", changes(320, 128, mx.bfloat16, "swiglu"))
    few = changes(384, 128, mx.bfloat16, "plain")
    assert not wide_changes.fits(384, 128, mx.bfloat16, "plain", few), "more than a quarter of the outputs"
    odd = stacked(128, [[(1024, 3)]], mx.bfloat16)  # 2 slots of 3 ranks
    assert not wide_changes.fits(1024, 128, mx.bfloat16, "plain", odd), "no whole vectors of ranks"
    narrow = stacked(128, [[(508, 2), (516, 2)]], mx.bfloat16)
    assert not wide_changes.fits(1024, 128, mx.bfloat16, "plain", narrow), "a part ends within a vector"
    normed = Stack(stack.down, stack.b, mx.ones(stack.b.shape[::2]), stack.spans)
    assert not wide_changes.fits(512, 128, mx.bfloat16, "plain", normed), "DoRA"


def test_what_there_is_one_launch_for() -> None:
    stack = changes(512, 128, mx.bfloat16, "plain")
    assert wide_changed_kernel.fits(512, 128, mx.bfloat16, "plain", stack)
    assert not wide_changed_kernel.fits(512, 128, mx.float16, "plain", stack)
    assert not wide_changed_kernel.fits(448, 128, mx.bfloat16, "plain", changes(448, 128, mx.bfloat16, "plain")), (
        "a part ends within a block"
    )
    odd = stacked(128, [[(1024, 6)]], mx.bfloat16)
    assert wide_changes.fits(1024, 128, mx.bfloat16, "plain", odd)
    assert not wide_changed_kernel.fits(1024, 128, mx.bfloat16, "plain", odd), "no whole vectors of ranks"
    many = stacked(64, [[(1024, 4)]] * 64, mx.bfloat16)
    assert wide_changes.fits(2048, 64, mx.bfloat16, "plain", stacked(64, [[(2048, 4)]] * 64, mx.bfloat16))
    assert not wide_changed_kernel.fits(1024, 64, mx.bfloat16, "plain", many), "slots"
    few = changes(512, 128, mx.bfloat16, "plain")
    for groups, right in ((2, True), (4, False)):
        way = Way(groups, 4, 1)
        fits = wide_changed_kernel.fits(512, 128, mx.bfloat16, "plain", few, lambda *_, way=way: way)
        assert fits == right, "registers"
    large = stacked(64, [[(8192, 128)]] * 12, mx.bfloat16)
    assert wide_changes.fits(8192, 64, mx.bfloat16, "plain", large)
    assert not wide_changed_kernel.fits(8192, 64, mx.bfloat16, "plain", large), "ranks have no room"


@pytest.mark.parametrize(("outputs", "inputs"), [(3072, 2048), (2048, 8192), (8192, 2048), (28672, 8192)])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_one_launch_shares_sums_as_the_product_does(outputs: int, inputs: int, epilogue: str) -> None:
    """A row without a change has the same bits beside others, unless their ranks take multiprocessors from the weight;
    and one with one has them in any batch."""
    for tokens in wide_product_kernel.TOKENS:
        usual = wide_product_kernel.way(outputs, inputs, tokens, epilogue)
        for choose in CHOOSE:
            way, other = choose(outputs, inputs, tokens, epilogue), choose(outputs, inputs, 64, epilogue)
            fewer = choose is wide_changed_kernel.yielding and usual.splits == 4
            shared = replace(way, pieces=1, stages=usual.stages)
            assert shared == (replace(usual, splits=3) if fewer else usual)
            assert wide_changed_kernel.beside(way, tokens) >= 28 * 1024 * way.groups
            assert way.stages > 3 or way.groups > 2
            assert (way.pieces, way.splits) == (other.pieces, other.splits)


@pytest.mark.parametrize(
    ("parts", "inputs", "epilogue"),
    [([2048, 512, 512], 2048, "plain"), ([2048], 2048, "plain"), ([8192] * 2, 2048, "swiglu"), ([2048], 8192, "plain")],
)
def test_nine_adapters_of_rank_8_run_at_once(parts: list[int], inputs: int, epilogue: str) -> None:
    """Each block on a multiprocessor of its own, in the shapes of Llama-3.2-1B; of twice as many ranks all still are,
    where the weight yields some; of eight times as many the first are short."""
    outputs = sum(parts) // kernel.parts(epilogue)
    what = outputs, inputs, mx.bfloat16, epilogue
    few, many, most = (stacked(inputs, [[(part, rank) for part in parts]] * 9, mx.bfloat16) for rank in (8, 16, 64))
    assert wide_changed_kernel.at_once(*what, few)
    assert wide_changed_kernel.at_once(*what, many) == (len(parts) == 3)
    assert wide_changed_kernel.yields(*what, many)
    assert not wide_changed_kernel.yields(*what, most)
    assert wide_changed_kernel.fits(*what, many)
    for tokens in wide_product_kernel.TOKENS:
        way, yielding, shorter = (choose(outputs, inputs, tokens, epilogue) for choose in CHOOSE)
        for how, stack in ((way, few), (yielding, many)):
            first = wide_changed_kernel.inner_blocks(how, 10, stack.down.shape[1])
            assert first + wide_product_kernel.blocks(outputs, how, epilogue) * how.splits <= PROCESSORS
        assert inputs // (64 * shorter.pieces) <= 8


class Launches:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self) -> None:
        self.inputs: list[mx.array] = []
        self.outputs: list[tuple[int, ...]] = []

    def launch(self, *, inputs: list[mx.array], output_shapes: list[tuple[int, ...]], **_: object) -> list[mx.array]:
        self.inputs, self.outputs = inputs, output_shapes
        return [mx.zeros(output_shapes[0])]


@pytest.mark.parametrize("rows", [1, 8, 31, 32, 33])
@pytest.mark.parametrize(
    ("outputs", "inputs", "epilogue"), [(2048, 8192, "plain"), (3072, 2048, "plain"), (8192, 2048, "swiglu")]
)
def test_what_blocks_leave_for_each_other_has_room(
    monkeypatch: pytest.MonkeyPatch, rows: int, outputs: int, inputs: int, epilogue: str
) -> None:
    """Of a product, and of one with changes: up to 32 tokens in arrays that stay, beyond in a result of its own."""
    launches = Launches()
    monkeypatch.setattr(wide_product_kernel, "_kernel", lambda *_: launches)
    monkeypatch.setattr(wide_changed_kernel, "_kernel", lambda *_: launches)
    x, weight = mx.zeros((rows, 1, inputs), mx.bfloat16), mx.zeros((1,))
    parts, few = kernel.parts(epilogue), rows <= 32
    sums = lambda way: rows * outputs * parts * way.splits if way.splits > 1 else 0  # noqa: E731
    told = lambda way: -(-rows // 8) * 8 * outputs * parts * (way.splits - 1)  # noqa: E731
    wide_product_kernel.multiply(outputs, inputs, mx.bfloat16, epilogue)(x, weight)
    alone = wide_product_kernel.way(outputs, inputs, rows, epilogue)
    assert [math.prod(shape) for shape in launches.outputs[1:]] == ([] if few or not sums(alone) else [sums(alone)])
    if few and sums(alone):
        assert launches.inputs[-1].size >= told(alone)
    numbers = [row % 3 for row in range(rows)]
    slots = RowSlots.of_arrays([mx.array(numbers, dtype=mx.int32), *boards_of(numbers)], None)
    stack = changes(outputs, inputs, mx.bfloat16, epilogue)
    for choose in CHOOSE:
        call = wide_changed_kernel.changed(outputs, inputs, mx.bfloat16, epilogue, choose)
        call(x, weight, None, stack, slots)
        way, (count, ranks, _) = choose(outputs, inputs, rows, epilogue), stack.down.shape
        inner = way.pieces * rows * count * ranks
        assert [math.prod(shape) for shape in launches.outputs[1:]] == ([] if few else [inner + sums(way)])
        assert not few or launches.inputs[-1].size >= inner
        assert not (few and sums(way)) or launches.inputs[-2].size >= told(way)


def test_launches_that_may_run_at_once_do_not_share_a_room() -> None:
    sizes = (1000, 513, 1024, 600, 700, 800, 900, 1000)
    rooms, exchanges = map(cuda_kernels.room, sizes), map(cuda_kernels.exchange, sizes)
    arrays = [*rooms, *exchanges]
    assert {array.size for array in arrays} == {1024}
    assert len({id(array) for array in arrays}) == 16
    assert cuda_kernels.room(1000) is arrays[0]
    assert cuda_kernels.exchange(1025).size == 2048
    assert all(mx.all(array.view(mx.uint32) == 0xFFFFFFFF).item() for array in arrays[8:]), "nobody has told anything"


def test_a_product_that_waits_anyway_is_not_cut_shorter() -> None:
    stack = stacked(64, [[(17408, 4)]], mx.bfloat16)
    assert wide_changed_kernel.at_once(17408, 64, mx.bfloat16, "plain", stack)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("outputs", "inputs"), [(3072, 2048), (2048, 8192), (8192, 2048), (28672, 8192)])
def test_one_launch_compiles_for_the_device(dtype: mx.Dtype, epilogue: str, outputs: int, inputs: int) -> None:
    for tokens, choose in product(wide_product_kernel.TOKENS, CHOOSE):
        way = choose(outputs, inputs, tokens, epilogue)
        needs = compile_kernel(
            wide_changed_kernel.header(way, tokens, dtype, epilogue),
            wide_changed_kernel.source(way, tokens, epilogue),
            wide_changed_kernel.inputs_of(way, tokens, epilogue, dtype),
            wide_changed_kernel.outputs_of(tokens, dtype, epilogue),
        )
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers * (way.groups * 128 + wide_changed_kernel.SIDE) <= 65536


def test_ranks_are_in_shared_memory_where_they_have_room_there() -> None:
    usual = expand.BY_VECTOR_WAY["swiglu"]
    assert expand.way(changes(256, 64, mx.bfloat16, "swiglu"), "swiglu") == expand.TILED_WAY
    assert expand.way(changes(256, 64, mx.bfloat16, "plain"), "plain") == expand.BY_VECTOR_WAY["plain"]
    assert expand.way(changes(272, 64, mx.bfloat16, "swiglu"), "swiglu") == usual, "a part ends within a tile"
    assert expand.way(stacked(64, [[(256, 100), (256, 100)]], mx.bfloat16), "swiglu") == usual, "too many ranks"


@pytest.mark.skipif(not wide_product_kernel.usable(), reason="no Hopper GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (512, 64), (2048, 8192), (8192, 1088), (3072, 2048)])
def test_on_the_device(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    batches = ((33, 1), (40, 1), (25, 2), (64, 1), (65, 1), (60, 2), (128, 1))
    check(wide_changes.changed, outputs, inputs, dtype, epilogue, wide_product_kernel.way, batches)


@pytest.mark.skipif(not wide_product_kernel.usable(), reason="no Hopper GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (2048, 8192), (8192, 1088), (3072, 2048)])
@pytest.mark.parametrize("choose", CHOOSE)
def test_one_launch_on_the_device(
    outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: wide_product_kernel.Choose
) -> None:
    batches = ((33, 1), (40, 1), (25, 2), (64, 1), (65, 1), (60, 2), (128, 1))
    check(wide_changed_kernel.changed, outputs, inputs, dtype, epilogue, choose, batches)


@pytest.mark.skipif(not wide_product_kernel.usable(), reason="no Hopper GPU")
def test_one_launch_with_many_ranks_on_the_device() -> None:
    """They have no room beside the chunks."""
    what, rows = (2048, 2048, mx.bfloat16), [row % 10 for row in range(100)]
    stack = stacked(2048, [[(2048, 40)]] * 9, mx.bfloat16)
    assert wide_changed_kernel.fits(*what, "plain", stack)
    x = mx.random.normal((100, 1, 2048)).astype(mx.bfloat16)
    weight = weight_of(2048, 2048, mx.bfloat16, "plain")
    one, two = (
        make(*what, "plain")(x, weight, None, stack, RowSlots.of(rows)).astype(mx.float32)
        for make in (partial(wide_changed_kernel.changed, choose=wide_changed_kernel.shorter), wide_changes.changed)
    )
    assert mx.allclose(one, two, rtol=2e-2, atol=2e-2).item()
