"""Planes that are made with what rows begin with in them: on the host, and on a GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv import begin_kernel, copy_kernel, planes
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.launches import separately
from tests.engine.kv.test_moves import LAYOUTS, filled, held, same


def check(dtype: mx.Dtype, count: int, heads: int, width: int, tokens: list[int]) -> None:
    """Of rows in all places, and of lengths at which the last stack is used to its end, and not."""
    stacks = [
        mx.random.randint(1, 250, (count, heads, some, width), key=mx.random.key(some)).astype(dtype) for some in tokens
    ]
    ends = [sum(tokens[: i + 1]) for i in range(len(tokens))]
    everything = mx.concatenate(stacks, axis=2)
    for slots, rows in ((1, range(1)), (3, range(1, 3)), (3, range(2, 3)), (2, range(2))):
        for length in (ends[-1], ends[-1] - tokens[-1] + 1):
            room = ends[-1] + 13
            expected = [mx.zeros((slots, heads, room, width), dtype) for _ in range(count)]
            for plane, lines in zip(expected, everything, strict=True):
                plane[rows.start : rows.stop, :, :length] = lines[:, :length]
            made = begin_kernel.begin(stacks, ends, length, rows, slots, room)
            assert all(mx.array_equal(*both).item() for both in zip(made, expected, strict=True))


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("dtype", [mx.float32, mx.uint16, mx.uint8], ids=str)
def test_on_the_host(monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype) -> None:
    on_host = CopiesOnHost(monkeypatch, threads=8, each=4)
    check(dtype, 3, 2, 16, [5, 1, 9])
    check(dtype, 3, 1, 6, [7])
    check(dtype, 3, 3, 8, [2] * begin_kernel.PIECES)
    assert {*on_host.begun} == {3}


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
def test_on_the_device() -> None:
    for dtype in (mx.bfloat16, mx.uint32):
        check(dtype, 4, 2, 6, [7, 30])
        check(dtype, copy_kernel.MOST, 8, 64, [300, 1, 1000])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.uint32], ids=str)
def test_compiles_for_the_device(dtype: mx.Dtype) -> None:
    count = copy_kernel.MOST
    template = [("T", dtype), *copy_kernel.constants().items()]
    needs = compile_kernel(
        "", begin_kernel.source(count), begin_kernel.inputs(dtype), begin_kernel.outputs(count, dtype), template
    )
    assert needs.local == 0
    assert needs.registers <= 64


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_rows_begin_with_is_there_after_a_launch_for_planes_that_are_alike(
    model_folder: ModelFolder, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Room included: nothing is cleared before, nothing put into it, and nothing has to be started apart."""
    model = load(model_folder("llama", wide=True))
    layout = LAYOUTS[name](model.model)
    caches = filled(model, layout, [5, 60])
    (_, expected) = held(caches)
    kept = Beginning(44, (caches.piece(1, 0, 30), caches.piece(1, 30, 60)))
    for way in ("paste", "reserve"):
        monkeypatch.setattr(planes.Planes, way, None)
    monkeypatch.setattr("runner.engine.kv.caches.start", None)
    restored = layout.restore([None, kept, kept], 300)
    assert on_host.begun == {"plain": [6], "packed": [6, 12]}[name]
    assert not on_host.put
    for row in (1, 2):
        assert same(held(restored)[row], [plane[:, :44] for plane in expected])
    for layer in restored.layers:
        for plane in layer._planes.arrays:
            assert plane.shape[2] == restored.capacity >= 300
            assert not plane[0].any().item()
            assert not plane[:, :, 44:].any().item()


def test_a_row_goes_on_from_there_as_from_pieces_that_were_put(
    model_folder: ModelFolder, on_host: CopiesOnHost
) -> None:
    model = load(model_folder("llama"))
    layout = Layout(model.model, launch=separately)
    caches = filled(model, layout, [40])
    kept = Beginning(40, (caches.piece(0, 0, 40),))
    whole = layout.restore([kept])
    put = layout.restore([Beginning(1, kept.pieces), kept])
    assert on_host.begun == [6]
    assert on_host.put == [6, 6]
    answers = [one.call(model.model, mx.array([[7]] * one.rows))[-1] for one in (whole, put, caches)]
    assert mx.allclose(answers[0], answers[1], rtol=1e-5, atol=1e-5).item()
    assert mx.allclose(answers[0], answers[2], rtol=1e-5, atol=1e-5).item()


def test_more_pieces_than_a_launch_takes_are_put(
    llama: LoadedModel, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(llama.model, launch=separately)
    caches = filled(llama, layout, [40])
    pieces = tuple(caches.piece(0, 2 * i, 2 * i + 2) for i in range(begin_kernel.PIECES + 1))
    restored = layout.restore([Beginning(34, pieces)])
    assert not on_host.begun
    assert len(on_host.put) == len(pieces)
    assert same(held(restored)[0], [plane[:, :34] for plane in held(caches)[0]])


@pytest.mark.parametrize("kind", ["gemma3_text", "lfm2"])
def test_layers_that_are_no_planes_of_all_tokens_take_what_was_kept_as_before(
    model_folder: ModelFolder, on_host: CopiesOnHost, kind: str
) -> None:
    model = load(model_folder(kind))
    layout = Layout(model.model, launch=separately)
    caches = filled(model, layout, [40])
    kept = Beginning(40, (caches.piece(0, 0, 40),), caches.state(0))
    again = layout.restore([kept]).call(model.model, mx.array([[1]]))
    assert not on_host.begun
    assert mx.allclose(again, caches.call(model.model, mx.array([[1]])), rtol=1e-4, atol=1e-4).item()
