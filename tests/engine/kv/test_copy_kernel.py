"""What is kept of a row is copied in one launch for all planes that are alike: on the host, and on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine import cuda_kernels
from runner.engine.kv import copy_kernel, planes
from runner.engine.kv.attention_kernel import SWITCH
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel, load
from runner.engine.prefix_cache import PrefixCache
from tests.engine.conftest import ModelFolder
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.drive import Driver, generate
from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.test_unwritten import Recorded
from tests.engine.tiny import encode

Shape = tuple[int, int, int, int]

SHAPES: list[Shape] = [(3, 2, 40, 64), (1, 8, 300, 16), (2, 1, 70, 6), (4, 3, 33, 1)]
"""Slots, heads, capacity, width: of whole vectors, and of none."""


def drawn(shape: Shape, dtype: mx.Dtype, count: int) -> list[mx.array]:
    """Planes, every second of them in an order of its own, as one that was written as a whole."""
    made = []
    for key in mx.random.split(mx.random.key(count), count):
        plane = mx.random.randint(0, 250, shape, key=key).astype(dtype)
        if len(made) % 2:
            plane = mx.contiguous(plane.swapaxes(1, 2)).swapaxes(1, 2)
        if len(made) % 4 == 3:
            plane = mx.contiguous(plane.swapaxes(2, 3)).swapaxes(2, 3)
        made.append(plane)
    mx.eval(made)
    return made


def check_copies(shape: Shape, dtype: mx.Dtype, count: int, some: Sequence[Sequence[int]] = ((0,),)) -> None:
    made = drawn(shape, dtype, count)
    for rows in some:
        for start, stop in [(0, shape[2]), (5, 6), (17, shape[2] - 1)]:
            copied = copy_kernel.copy(made, rows, start, stop)
            assert copied.dtype == dtype
            expected = [mx.concatenate([plane[row, :, start:stop] for row in rows]) for plane in made]
            assert mx.array_equal(copied, mx.stack(expected)).item()


def check_puts(shape: Shape, dtype: mx.Dtype, count: int) -> None:
    """Of several rows, in an order of their own, and of one to several; zeros follow."""
    slots, heads, room, width = shape
    for sources, rows in ((1, [slots - 1]), (1, [*range(slots)]), (slots, [*reversed(range(slots))])):
        for start, tokens, end in [(0, room - 9, room), (3, 7, 10), (5, 4, room - 2)]:
            made = drawn(shape, dtype, count)
            stack = mx.random.randint(1, 250, (count, sources * heads, tokens + 2, width)).astype(dtype)
            expected = [mx.array(plane) for plane in made]
            for i, row in enumerate(rows):
                first = i * heads if sources > 1 else 0
                for plane, part in zip(expected, stack[:, first : first + heads, :tokens], strict=True):
                    plane[row, :, start : start + tokens] = part
                    plane[row, :, start + tokens : end] = 0
            mx.eval(expected, copy_kernel.put(made, stack, rows, start, tokens, end))
            assert all(mx.array_equal(*both).item() for both in zip(made, expected, strict=True))


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("dtype", [mx.float32, mx.uint16, mx.uint8], ids=str)
def test_on_the_host(monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype) -> None:
    on_host = CopiesOnHost(monkeypatch, threads=8, each=4)
    for shape in SHAPES:
        check_copies(shape, dtype, 4, [[0], [*reversed(range(shape[0]))]])
        check_puts(shape, dtype, 4)
    assert {planes for _, planes in on_host.launches} == {4}


def test_planes_that_begin_anywhere_on_the_host(on_host: CopiesOnHost) -> None:
    on_host.aligned = False
    check_copies(SHAPES[0], mx.float32, 2, [[0], [2, 1]])
    check_puts(SHAPES[0], mx.float32, 2)
    assert on_host.copied
    assert on_host.put


@pytest.mark.parametrize("count", [1, 5])
def test_separate_operations(count: int) -> None:
    for shape in SHAPES:
        check_copies(shape, mx.float16, count)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1, 5, copy_kernel.MOST])
def test_on_the_device(count: int) -> None:
    for dtype in (mx.bfloat16, mx.uint32):
        for shape in (*SHAPES, (3, 8, 1024, 128)):
            assert copy_kernel.applies(drawn(shape, dtype, 1))
            check_copies(shape, dtype, count, [[0], [*reversed(range(shape[0]))]])
            check_puts(shape, dtype, count)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.uint32], ids=str)
@pytest.mark.parametrize("of", [copy_kernel.COPY, copy_kernel.PUT], ids=["copy", "put"])
def test_compiles_for_the_device(of: str, dtype: mx.Dtype) -> None:
    count = copy_kernel.MOST
    outputs = {"out": dtype} if of == copy_kernel.COPY else {"done": mx.int32}
    arrays, template = copy_kernel.inputs(of, count, dtype), [("T", dtype), *copy_kernel.constants().items()]
    needs = compile_kernel("", copy_kernel.source(of, count), arrays, outputs, template)
    assert needs.local == 0, "nothing has to be put aside: addresses least of all"
    assert needs.registers <= 64
    # Arrays of ten: a shape is 40 bytes, strides are 80.
    assert 88 * count + 8 * (len(arrays) - count + 1) + 3 * 40 <= 4096, "that many parameters a kernel has for certain"


def test_what_a_launch_can_count() -> None:
    """Long rows go one by one."""
    assert copy_kernel.rows_at_once(mx.zeros((16, 8, 256, 64))) == 8192
    plane = mx.broadcast_to(mx.array(0.0), (64, 32, 1 << 17, 128))
    assert copy_kernel.rows_at_once(plane) == 2


def test_it_is_on_where_there_is_a_device_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(cuda_kernels, "usable", cuda_kernels.usable.__wrapped__)
    assert copy_kernel.applies([mx.zeros((2, 2, 8, 4))])
    assert not copy_kernel.applies([mx.zeros((2, 2, 8, 0))])
    assert not copy_kernel.applies([mx.broadcast_to(mx.array(0.0), (4, 64, 1 << 18, 128))]), "a row of 2^31 values"
    monkeypatch.setenv(SWITCH, "0")
    assert not copy_kernel.applies([mx.zeros((2, 2, 8, 4))])


# ------------------------------------------------------------- pieces of a row


def filled(model: LoadedModel, layout: Layout, lengths: list[int]) -> Caches:
    caches = layout.new(len(lengths))
    prompts = [[(7 * i + j) % model.vocabulary for j in range(max(lengths))] for i in range(len(lengths))]
    caches.call(model.model, mx.array(prompts), lengths)
    return caches


def made_of(arrays: list[mx.array], scratch: Path) -> Counter[str]:
    """The operations that arrays are made of, by what they are; what they begin with is computed."""
    mx.export_to_dot(str(scratch / "graph.dot"), *arrays)  # type: ignore[attr-defined]
    return Counter(re.findall(r'label ?= ?"(\w+)", shape=rectangle', (scratch / "graph.dot").read_text()))


@pytest.mark.parametrize("bits", [0, 8])
def test_a_row_is_kept_in_one_launch_for_planes_that_are_alike(
    model_folder: ModelFolder, on_host: CopiesOnHost, bits: int
) -> None:
    """Keys and values of three layers; where they are packed, their scales and biases are of another shape."""
    model = load(model_folder("llama", wide=True), quantisation=Quantisation(bits, 64) if bits else None)
    caches = filled(model, model.layout, [60, 33])
    piece = caches.piece(1, 3, 30)
    assert on_host.copied == ([6, 12] if bits else [6])
    assert piece.complete
    for layer, places in zip(caches.layers, piece.layers, strict=True):
        assert places is not None
        for kept, plane in zip(piece.of(places, 20), layer._planes.arrays, strict=True):
            assert mx.array_equal(kept, plane[1:2, :, 3:23]).item()
    part = piece.part(10, 12)
    assert (part.start, part.stop, part.nbytes) == (10, 12, piece.nbytes // 27 * 2)
    assert mx.array_equal(part.arrays[0], piece.arrays[0][:, :, 7:9]).item()


def test_more_planes_than_a_launch_has_room_for(
    llama: LoadedModel, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_kernel, "MOST", 4)
    caches = filled(llama, llama.layout, [40])
    kept = Beginning(40, (caches.piece(0, 0, 40),))
    assert on_host.copied == [4, 2]
    restored = llama.layout.restore([kept])
    for layer, other in zip(caches.layers, restored.layers, strict=True):
        assert mx.array_equal(layer.keys[:, :, :40], other.keys[:, :, :40]).item()


def test_it_is_copied_once_what_was_written_is_on_its_way(
    llama: LoadedModel, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[mx.array] = []
    monkeypatch.setattr(planes, "start", started.append)
    launch = Recorded()
    caches = Layout(llama.model, launch=launch).new(1)
    caches.call(llama.model, mx.array([[1, 2, 3]]))
    assert not started
    caches.piece(0, 0, 3)
    assert on_host.copied == [6]
    assert all(any(array is other for other in started) for array in launch.returned)


def test_an_end_that_grows_is_copied_once(llama: LoadedModel, tmp_path: Path) -> None:
    """All of it, from the row: not what is new, and then both."""
    prefixes = PrefixCache(1 << 24)
    caches = filled(llama, llama.layout, [60])
    mx.eval(caches.arrays)
    tokens = [(7 * 0 + j) % llama.vocabulary for j in range(60)]
    for length in (20, 60):
        copied: list[mx.array] = []
        prefixes._store("", tokens[:length], caches, 0, copied)
        found = prefixes.look_up("", [*tokens[:length], 1])
        assert found is not None
        (piece,) = found.pieces
        assert (piece.start, piece.stop) == (0, length)
        assert len(copied) == 1
        assert made_of(copied, tmp_path) == {"Slice": 6, "Concatenate": 1}
        mx.eval(copied)
    for layer, places in zip(caches.layers, piece.layers, strict=True):
        assert places is not None
        assert mx.array_equal(piece.of(places, 60)[0], layer.keys[:, :, :60]).item()


def test_an_end_whose_states_are_elsewhere_grows_by_what_the_row_has(model_folder: ModelFolder) -> None:
    """A window that has wrapped since has no positions of its own any more: what is new is then kept apart."""
    model = load(model_folder("gemma3_text"))
    prefixes = PrefixCache(1 << 24)
    tokens = [(7 * j) % model.vocabulary for j in range(60)]
    for length, nodes in ((12, 1), (20, 1), (60, 2)):
        caches = model.layout.new()
        caches.call(model.model, mx.array([tokens[:length]]))
        prefixes.store("", tokens[:length], caches, 0)
        assert prefixes._nodes == nodes
        found = prefixes.look_up("", [*tokens[:length], 1])
        assert found is not None
        assert found.length == length
        again = model.layout.restore([found]).call(model.model, mx.array([[1]]))
        assert mx.allclose(again, caches.call(model.model, mx.array([[1]])), rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_an_engine_says_the_same(model_folder: ModelFolder, on_host: CopiesOnHost, model_type: str) -> None:
    model = load(model_folder(model_type))
    texts = [encode("the quick brown fox jumps over the lazy dog. " * count) for count in (1, 2, 2)]

    def answers(prefix_cache_bytes: int) -> list[str]:
        driver = Driver(model, max_rows=4, prefix_cache_bytes=prefix_cache_bytes, prefill_step_size=16)
        for first in (0, 10):
            driver.run([generate(first + i, prompt=[*text, 9 + first], max_tokens=9) for i, text in enumerate(texts)])
        return driver.texts

    expected = answers(0)
    assert not on_host.copied
    assert answers(1 << 24) == expected
    assert len(on_host.copied) > 4
