"""The kernel for products of up to 128 tokens: on the host, compiled for a GPU, and on one where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import wide_product_kernel
from runner.engine.product_kernel import Multiply
from runner.engine.wide_product_kernel import TOKENS, Way
from tests.engine import wide_product_on_host
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.test_product_kernel import DTYPES, EPILOGUES, SHAPES, WHAT, check_epilogues, draw, exact, expected
from tests.engine.wide_product_on_host import WideOnHost

Make = Callable[[int, int, mx.Dtype, str, wide_product_kernel.Choose], Multiply]

ROWS = [20, 33, 40, 64, 65, 100, 128]


def check(
    make: Make,
    outputs: int,
    inputs: int,
    dtype: mx.Dtype,
    epilogue: str,
    way: Way | None = None,
    counts: list[int] = ROWS,
) -> None:
    """Against float64; and a row gives the same bits however many are beside it, and wherever it is."""
    parts, most = 2 if epilogue == "swiglu" else 1, max(counts)
    choose = wide_product_kernel.way if way is None else lambda *_: way
    product = make(outputs, inputs, dtype, "plain" if epilogue == "add" else epilogue, choose)
    weight = draw((outputs * parts, inputs), 1, dtype, inputs**-0.5)
    tokens, added = draw((most, inputs), 2, dtype, 2.0), draw((most, outputs), 3, dtype)

    def of(rows: int, first: int = 0) -> mx.array:
        more = (added[first : first + rows, None],) if epilogue == "add" else ()
        return product(tokens[first : first + rows, None], weight, *more)[:, 0]

    close = 2e-2 if dtype == mx.bfloat16 else 3e-3
    all_rows = of(most)
    np.testing.assert_allclose(exact(all_rows), expected(tokens, weight, added, epilogue), rtol=close, atol=close)
    for rows in counts[:-1]:
        assert mx.array_equal(of(rows), all_rows[:rows]).item(), f"{rows} rows"
    least = counts[0]
    assert mx.array_equal(of(least, most - least), all_rows[most - least :]).item(), "wherever they are in the batch"


@pytest.fixture(scope="module")
def on_host() -> Make:
    return WideOnHost().multiply


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "way"),
    [
        (64, 448, mx.bfloat16, "plain", Way(1, 4, 1)),  # more chunks than stages
        (64, 192, mx.float16, "add", Way(1, 6, 2)),  # a block has one chunk, the other two: fewer than stages
        (64, 320, mx.bfloat16, "swiglu", Way(2, 5, 1)),
    ],
    ids=str,
)
def test_on_the_host(on_host: Make, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, way: Way) -> None:
    check(on_host, outputs, inputs, dtype, epilogue, way, [20, 40, 65])


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize("way", [Way(1, 8, 1), Way(1, 4, 4), Way(2, 6, 2), Way(4, 4, 1)], ids=str)
def test_on_the_host_in_all_ways(on_host: Make, dtype: mx.Dtype, epilogue: str, way: Way) -> None:
    check(on_host, 256, 640, dtype, epilogue, way)


@pytest.mark.parametrize("rows", [8, 20])
def test_numbers_that_do_not_come_make_no_sum(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Nor does the launch wait for ever: a launch at the same time has taken them."""
    kept = "static void put(float4* at, float4 four) { *at = four; }"
    assert wide_product_on_host.DEVICE.count(kept) == 1
    lost = kept.replace("*at = four;", "if (blockIdx.x >= 2) *at = four;")
    monkeypatch.setattr(wide_product_on_host, "DEVICE", wide_product_on_host.DEVICE.replace(kept, lost))
    x, weight = draw((rows, 1, 192), 1, mx.float16), draw((128, 192), 2, mx.float16)
    product = WideOnHost().multiply(128, 192, mx.float16, "plain", lambda *_: Way(1, 6, 2))
    missing = mx.isnan(product(x, weight)[:, 0]).all(axis=0).tolist()
    assert missing == [True] * 64 + [False] * 64, "two blocks share a sum: those of the first did not come"


@pytest.mark.skipif(not wide_product_kernel.usable(), reason="no Hopper GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (64, 64), (2048, 8192), (8192, 1088), (67584, 512)])
def test_on_the_device(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    check(wide_product_kernel.multiply, outputs, inputs, dtype, epilogue)


@pytest.mark.skipif(not wide_product_kernel.usable(), reason="no Hopper GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_are_the_separate_operations_on_the_device(dtype: mx.Dtype) -> None:
    check_epilogues(lambda *shape: wide_product_kernel.multiply(*shape, lambda *_: Way(2, 6, 2)), 15, dtype)


FITTING = [shape for shape in SHAPES if shape[0] % 64 == 0]


@pytest.mark.parametrize(("outputs", "inputs"), FITTING)
@pytest.mark.parametrize("epilogue", [*EPILOGUES, "changes"])
def test_ways_fit_the_device_and_the_weight(outputs: int, inputs: int, epilogue: str) -> None:
    ways = [wide_product_kernel.way(outputs, inputs, tokens, epilogue) for tokens in TOKENS]
    assert len({(way.splits, way.pieces) for way in ways}) == 1, (
        "else a row's bits would depend on how many rows there are"
    )
    for way, tokens in zip(ways, TOKENS, strict=True):
        assert way.stages >= 3, "one chunk is used while one arrives, and one is done with"
        assert tokens * (way.groups * 64 + 4) * 4 <= way.shared_memory(tokens) - 1024, "sums go where chunks were"
        assert way.shared_memory(tokens) + 1024 <= 227 * 1024
        assert wide_product_kernel.blocks(outputs, way, epilogue) > 0
        assert inputs // 64 >= max(way.splits, way.pieces)


def test_what_there_is_a_kernel_for() -> None:
    assert wide_product_kernel.fits(64, 64, mx.bfloat16)
    assert wide_product_kernel.fits(32, 64, mx.bfloat16, "swiglu")
    assert not wide_product_kernel.fits(32, 64, mx.bfloat16)
    assert not wide_product_kernel.fits(64, 96, mx.bfloat16)
    assert not wide_product_kernel.fits(64, 64, mx.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [*EPILOGUES, "changes"])
def test_compiles_for_the_device(dtype: mx.Dtype, epilogue: str) -> None:
    ways = {
        (wide_product_kernel.way(*shape, tokens, epilogue), tokens)
        for shape, tokens in itertools.product(FITTING, TOKENS)
    }
    for way, tokens in ways:
        needs = compile_kernel(
            wide_product_kernel.header(way, tokens, dtype, epilogue),
            wide_product_kernel.source(way, tokens, epilogue),
            wide_product_kernel.inputs_of(way, tokens, epilogue, dtype),
            wide_product_kernel.outputs_of(way, tokens, dtype, epilogue),
        )
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers * way.groups * 128 <= 65536
