"""What the host reads of a step where the device leaves it: the kernel on the host, and all of it on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import cuda_kernels, zero_copy
from runner.engine.batch import StepResult
from runner.engine.loader import LoadedModel
from runner.engine.zero_copy import MOST, SOURCE, SWITCH, post
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import only_with_arrays_on_the_host

TYPES = {mx.uint32: "unsigned", mx.int32: "int"}


class OnHost:
    """Stands for the two kernels: a launch has run when it returns."""

    def __init__(self) -> None:
        self.launches = 0
        self.wrong = False
        self._built: dict[mx.Dtype | None, Run] = {}

    def of(self, kept: mx.Dtype | None) -> _Launched:
        return _Launched(self, kept)

    def run(self, kept: mx.Dtype | None, inputs: list[mx.array]) -> mx.array:
        self.launches += 1
        arrays = {name: np.asarray(array) for name, array in zip(("tokens", "place", "kept"), inputs, strict=False)}
        done = np.zeros(1, dtype=np.uint32)
        if kept not in self._built:
            kinds = {"tokens": "unsigned", "place": "unsigned"} | ({} if kept is None else {"kept": TYPES[kept]})
            arguments = {name: f"const {kind}*" for name, kind in kinds.items()} | {"done": "unsigned*"}
            arguments |= {f"{name}_shape": "const int*" for name in kinds}
            arguments |= {f"{name}_ndim": "int" for name in kinds}
            self._built[kept] = compiled(zero_copy.header(kept=kept is not None), SOURCE, arguments, "")
        shapes = [np.array(array.shape, dtype=np.int32) for array in arrays.values()]
        self._built[kept](
            *(ctypes.c_int(1), ctypes.c_int(zero_copy.THREADS)),
            *(ctypes.c_void_p(array.ctypes.data) for array in (*arrays.values(), done, *shapes)),
            *(ctypes.c_int(array.ndim) for array in arrays.values()),
        )
        if self.wrong:
            memoryview(inputs[1])[0] += 1  # type: ignore[arg-type]
        return mx.array(done)


class _Launched:
    def __init__(self, whole: OnHost, kept: mx.Dtype | None) -> None:
        self._whole, self._kept = whole, kept

    def launch(self, inputs: list[mx.array], **_: Any) -> list[mx.array]:
        mx.eval(inputs)
        return [self._whole.run(self._kept, inputs)]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHost]:
    """As if there were a device that reaches the host's memory."""
    only_with_arrays_on_the_host()
    kernels = OnHost()
    monkeypatch.setattr(cuda_kernels, "usable", lambda switch: switch == SWITCH)
    monkeypatch.setattr(zero_copy, "_stays_on_the_host", lambda address, size: size == MOST * 4)
    monkeypatch.setattr(zero_copy, "_kernel", kernels.of)
    zero_copy._tried.cache_clear()
    yield kernels
    zero_copy._tried.cache_clear()


def numbers(rows: int, each: int, first: int = 0) -> mx.array:
    return mx.arange(first, first + rows * each, dtype=mx.uint32).reshape(rows, each)


def check(rows: int, each: int, kept: mx.Dtype | None) -> None:
    """Two steps on their way, of which the older is read first."""
    steps = []
    for first in (1, 5000):
        tokens = numbers(rows, each, first)
        counts = None if kept is None else mx.arange(rows).astype(kept) % each
        posted = post(tokens, counts)
        assert posted is not None
        mx.async_eval([tokens, posted.done])  # type: ignore[no-untyped-call]
        steps.append((posted, tokens, counts))
    for posted, tokens, counts in steps:
        assert posted.read() == (tokens.tolist(), None if counts is None else counts.tolist())


SHAPES = [(3, 1, None), (3, 5, mx.int32), (128, 5, mx.uint32), (600, 1, None)]


@pytest.mark.parametrize(("rows", "each", "kept"), SHAPES, ids=str)
def test_numbers_are_where_the_host_reads_them(on_host: OnHost, rows: int, each: int, kept: mx.Dtype | None) -> None:
    check(rows, each, kept)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rows", "each", "kept"), SHAPES, ids=str)
def test_numbers_are_where_the_host_reads_them_on_the_device(rows: int, each: int, kept: mx.Dtype | None) -> None:
    check(rows, each, kept)


def test_a_step_is_read_from_there(on_host: OnHost) -> None:
    """And its arrays are not."""
    tokens, kept = numbers(2, 3, 10), mx.array([2, 0], dtype=mx.int32)
    posted = post(tokens, kept)
    assert StepResult([], tokens[:0], None, 2, kept[:0], posted).read() == ([[10, 11, 12], [13]], [2, 0])
    alone = numbers(3, 1, 7)
    assert StepResult([], alone[:0], None, posted=post(alone)).read() == ([[7], [8], [9]], [0, 0, 0])


def test_places_are_tried_before_the_first_step(on_host: OnHost, llama: LoadedModel) -> None:
    Driver(llama)
    assert on_host.launches == 2 * zero_copy._PLACES
    assert post(numbers(3, 1)) is not None
    assert on_host.launches == 2 * zero_copy._PLACES + 1
    zero_copy._tried.cache_clear()
    on_host.wrong = True
    assert post(numbers(3, 1)) is None


def test_an_engine_says_what_it_says_without(
    on_host: OnHost, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[str]:
        driver = Driver(llama)
        for row in range(4):
            driver.engine.submit(
                generate(row, prompt="abc"[: row + 1], max_tokens=4 + 2 * row, seed=row, temperature=1.0)
            )
        driver.drain()
        return [driver.answers[row].text for row in range(4)]

    there = said()
    assert on_host.launches > 2 * zero_copy._PLACES + 4
    monkeypatch.setattr("runner.engine.zero_copy.post", lambda *_: None)
    assert said() == there


def test_without_the_driver_s_advice_arrays_are_read(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_copy, "_stays_on_the_host", lambda *_: False)
    assert post(numbers(3, 1)) is None
    assert not on_host.launches


def test_there_is_no_driver_here() -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    assert not zero_copy._stays_on_the_host(0, 4096)
    assert post(numbers(3, 1)) is None


def test_what_it_does_not_take(on_host: OnHost) -> None:
    assert post(numbers(2, 1)) is None, "so few stay anyway"
    assert post(numbers(3, 1).astype(mx.int32)) is None
    assert post(numbers(2, 2), mx.zeros((2,))) is None
    assert post(numbers(MOST, 1)) is not None
    assert post(numbers(MOST, 1), mx.zeros((MOST,), mx.int32)) is None


@pytest.mark.nightly
@pytest.mark.parametrize("kept", [None, mx.int32, mx.uint32], ids=str)
def test_compiles_for_the_device(kept: mx.Dtype | None) -> None:
    inputs = {"tokens": mx.uint32, "place": mx.uint32} | ({} if kept is None else {"kept": kept})
    compile_kernel(zero_copy.header(kept=kept is not None), SOURCE, inputs, {"done": mx.uint32})
