"""The kernel for products of few tokens: on the host, compiled for a GPU, and on one where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu

from runner.engine import product_kernel
from runner.engine.product_kernel import TILES, Multiply, Way
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.product_on_host import OnHost

Make = Callable[[int, int, mx.Dtype, str, product_kernel.Choose], Multiply]

DTYPES = [mx.bfloat16, mx.float16]
EPILOGUES = ["plain", "swiglu"]
WHAT = [*EPILOGUES, "add"]
ROWS = [1, 3, 8, 9, 17, 32]


def draw(shape: tuple[int, ...], seed: int, dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def check(make: Make, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, way: Way | None = None) -> None:
    """Against float64; and a row alone gives the bits that it gives among others."""
    parts = 2 if epilogue == "swiglu" else 1
    choose = product_kernel.way if way is None else lambda *_: way
    product = make(outputs, inputs, dtype, "plain" if epilogue == "add" else epilogue, choose)
    weight = draw((outputs * parts, inputs), 1, dtype, inputs**-0.5)
    tokens, added = draw((32, inputs), 2, dtype, 2.0), draw((32, outputs), 3, dtype)

    def of(rows: int, first: int = 0) -> mx.array:
        more = (added[None, first : first + rows],) if epilogue == "add" else ()
        return product(tokens[None, first : first + rows], weight, *more)

    close = 2e-2 if dtype == mx.bfloat16 else 3e-3
    exactly = expected(tokens, weight, added, epilogue)
    all_rows = of(32)[0]
    np.testing.assert_allclose(exact(all_rows), exactly, rtol=close, atol=close)
    for rows in ROWS:
        assert mx.array_equal(of(rows)[0], all_rows[:rows]).item(), f"{rows} rows"
    assert mx.array_equal(of(2, 30)[0], all_rows[30:]).item(), "wherever the rows are in the batch"


def check_epilogues(
    make: Callable[[int, int, mx.Dtype, str], Multiply], count: int, dtype: mx.Dtype, outputs: int = 512
) -> None:
    """They are the separate operations to the bit, given the same sums, for four rows of so many tokens."""
    inputs = 2 * outputs
    weight, tokens = draw((2 * outputs, inputs), 1, dtype, 4 * inputs**-0.5), draw((4, count, inputs), 2, dtype)
    added = draw((4, count, outputs), 3, dtype)
    plain, gated = (make(outputs, inputs, dtype, kind) for kind in EPILOGUES)
    gate, up = plain(tokens, weight[:outputs]), plain(tokens, weight[outputs:])
    assert mx.array_equal(plain(tokens, weight[:outputs], added), added + gate).item()
    assert mx.array_equal(gated(tokens, weight), swiglu(gate, up)).item()


def expected(tokens: mx.array, weight: mx.array, added: mx.array, epilogue: str) -> np.ndarray:  # type: ignore[type-arg]
    sums = exact(tokens) @ exact(weight).T
    if epilogue == "add":
        return sums + exact(added)
    if epilogue == "swiglu":
        gate, up = np.split(sums, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up
    return sums


def exact(array: mx.array) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.fixture(scope="module")
def on_host() -> Make:
    return OnHost().multiply


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "way"),
    [
        (32, 192, mx.bfloat16, "plain", Way(2, 2, 1)),  # a warp has one chunk more than the other
        (32, 128, mx.float16, "add", Way(1, 4, 2)),  # fewer chunks than stages
        (16, 320, mx.bfloat16, "swiglu", Way(2, 2, 2)),
    ],
    ids=str,
)
def test_on_the_host(on_host: Make, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, way: Way) -> None:
    check(on_host, outputs, inputs, dtype, epilogue, way)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize("way", [Way(4, 1, 2), Way(2, 4, 2), Way(8, 2, 2)], ids=str)
def test_on_the_host_in_all_ways(on_host: Make, dtype: mx.Dtype, epilogue: str, way: Way) -> None:
    check(on_host, 64, 640, dtype, epilogue, way)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (48, 64), (2048, 8192), (16384, 1088)])
def test_on_the_device(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    check(product_kernel.multiply, outputs, inputs, dtype, epilogue)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_are_the_separate_operations_on_the_device(dtype: mx.Dtype) -> None:
    check_epilogues(lambda *shape: product_kernel.multiply(*shape, lambda *_: Way(8, 2, 2)), 5, dtype)


SHAPES = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048), (48, 64), (4864, 896)]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_ways_fit_the_device_and_the_weight(outputs: int, inputs: int, epilogue: str) -> None:
    ways = [product_kernel.way(outputs, inputs, tiles, epilogue) for tiles in TILES]
    assert len({way.warps for way in ways}) == 1, "else a row's bits would depend on how many rows there are"
    for way, tiles in zip(ways, TILES, strict=True):
        assert way.shared_memory <= 227 * 1024
        assert tiles <= 4 * way.stages, "a warp's sums go where its weights were"
        assert outputs * (2 if epilogue == "swiglu" else 1) % (16 * way.mtiles) == 0


def test_what_there_is_a_kernel_for() -> None:
    assert product_kernel.fits(2048, 64, mx.bfloat16)
    assert not product_kernel.fits(2048, 96, mx.bfloat16)
    assert not product_kernel.fits(2040, 64, mx.float16)
    assert not product_kernel.fits(2048, 64, mx.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_compiles_for_the_device(dtype: mx.Dtype, epilogue: str) -> None:
    arrays = dict.fromkeys(product_kernel.inputs_of(epilogue), dtype)
    ways = {(product_kernel.way(*shape, tiles, epilogue), tiles) for shape, tiles in itertools.product(SHAPES, TILES)}
    for way, tiles in ways:
        header = product_kernel.header(way, tiles, dtype, epilogue)
        needs = compile_kernel(header, product_kernel.source(epilogue), arrays, {"out": dtype})
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers * way.warps * 32 <= 65536
