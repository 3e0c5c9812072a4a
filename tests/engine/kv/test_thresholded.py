"""Keys and values that are packed from a position on: what each query sees, and that neither chunks nor neighbours,
beginnings nor cuts change it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import mlx.core as mx
import pytest

from runner.engine.kv import quantised_kernel
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.thresholded import After, Before, Thresholded
from runner.engine.loader import LoadedModel, load
from runner.engine.prefix_cache import PrefixCache
from tests.engine.conftest import ModelFolder
from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.launches import OnDevice, OnHost
from tests.engine.kv.packed_on_host import PackedOnHost

FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2"]
START = 20
HOW = Quantisation(4, 32, START)
PROMPT = [(7 * i) % 300 for i in range(70)]
CLOSE = 1e-3 if mx.default_device() == mx.Device(mx.cpu) else 0.5
"""What sums in another order come to in logits; a GPU's products of float32 take fewer bits."""

FLIPPED = 0.1
"""Share of tokens that may be further off, since sums in another order may make another code of a value that lies
between two. What sees packed keys in the place of plain ones, or the other way round, is off for all tokens."""


@pytest.fixture(scope="module")
def llama(model_folder: ModelFolder) -> LoadedModel:
    return load(model_folder("llama", wide=True), slack=16, quantisation=HOW)


def called(model: LoadedModel, caches: Caches, tokens: Sequence[Sequence[int]]) -> mx.array:
    """The logits of rows' tokens, padded: [rows, width, vocabulary]."""
    width = max(map(len, tokens))
    padded = mx.array([[*row, *[0] * (width - len(row))] for row in tokens])
    logits = caches.call(model.model, padded, [len(row) for row in tokens])
    mx.eval(logits, caches.arrays)
    return logits


def read(model: LoadedModel, prompt: Sequence[int], chunk: int = 512) -> tuple[Caches, mx.array]:
    """A row that has a prompt, and the logits of all its tokens, [tokens, vocabulary]."""
    caches = model.layout.new()
    parts = [called(model, caches, [prompt[i : i + chunk]])[0] for i in range(0, len(prompt), chunk)]
    return caches, mx.concatenate(parts)


def leaves(caches: Caches) -> tuple[Before, After]:
    """Those of the first layer that has both."""
    return next(layer.caches for layer in caches.layers if isinstance(layer, Thresholded))


def off(found: mx.array, expected: mx.array) -> mx.array:
    """Of each token, by how much its logits differ."""
    return mx.abs(found - expected).max(axis=-1).reshape(-1)


def assert_close(found: mx.array, expected: mx.array) -> None:
    assert (off(found, expected) <= CLOSE).mean().item() >= 1 - FLIPPED


def test_a_query_sees_what_its_position_says(
    model_folder: ModelFolder, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against upstream's caches, and an attention that is spelled out."""
    expected_of = {}
    upstream = load(model_folder("llama", wide=True))

    def spelled_out(queries, keys, values, cache, scale, mask, sinks=None):  # type: ignore[no-untyped-def]
        tokens = queries.shape[2]
        keys, values = (mx.repeat(array, queries.shape[1] // array.shape[1], axis=1) for array in (keys, values))
        seen = mx.arange(tokens) <= mx.arange(tokens)[:, None]
        both = []
        for pack in (False, True):
            k, v = (HOW.unpack(HOW.pack(array)) if pack else array for array in (keys, values))
            scores = mx.where(seen, scale * (queries @ k.swapaxes(-1, -2)), -mx.inf)
            both.append(mx.softmax(scores, axis=-1) @ v)
        return mx.where((mx.arange(tokens) < start)[:, None], *both)

    for start in (START, 0, len(PROMPT)):
        with monkeypatch.context() as patch:
            module = sys.modules["mlx_lm.models.llama"]
            patch.setattr(module, "scaled_dot_product_attention", spelled_out)
            expected_of[start] = upstream.model(mx.array([PROMPT]), cache=upstream.layout.upstream())[0]
            mx.eval(expected_of[start])
    _, found = read(llama, PROMPT)
    assert_close(found, expected_of[START])
    for other in (0, len(PROMPT)):
        assert (off(found, expected_of[other]) > CLOSE).mean().item() > 0.5


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        *(("llama", chunk) for chunk in (1, 7, START, 33)),
        *(
            pytest.param(kind, chunk, marks=[] if chunk == 33 else pytest.mark.nightly)
            for kind in FAMILIES[1:]
            for chunk in (1, 7, START, 33)
        ),
    ],
)
def test_chunks_make_no_difference(model_folder: ModelFolder, kind: str, chunk: int) -> None:
    """Of few tokens and of many; that end at the threshold, and elsewhere."""
    model = load(model_folder(kind, wide=True), quantisation=HOW)
    assert_close(read(model, PROMPT, chunk)[1], read(model, PROMPT)[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_on_both_sides_are_what_they_are_alone(model_folder: ModelFolder, kind: str) -> None:
    """One comes to the threshold by decoding, one as its neighbour did, and one is beyond it."""
    model = load(model_folder(kind, wide=True), quantisation=HOW)
    rows = [PROMPT[:5], PROMPT[3:63], PROMPT[2:18]]
    together = model.layout.new(3)
    called(model, together, rows)
    alone = [read(model, row)[0] for row in rows]
    found, expected = [], []
    for step in range(20):
        tokens = [[9 + step], [8], [7 * step]]
        found.append(called(model, together, tokens)[:, -1])
        expected += [called(model, row, [new])[0] for row, new in zip(alone, tokens, strict=True)]
    assert_close(mx.concatenate(found), mx.concatenate(expected))


def test_rows_join_and_leave(llama: LoadedModel) -> None:
    """Batches of which one has nothing packed, either way round; rows move to others' slots."""
    short, long = PROMPT[:9], PROMPT[4:44]
    for first, second in ((short, long), (long, short)):
        batch, other = read(llama, first)[0], read(llama, second)[0]
        batch.join(other)
        batch.join(read(llama, short[:4])[0])
        batch.join(read(llama, long[:30])[0])
        alone = [read(llama, row)[0] for row in (first, second, short[:4], long[:30])]
        for step in range(4):
            found = called(llama, batch, [[step + 3]] * 4)[:, -1]
            assert_close(found, mx.concatenate([called(llama, row, [[step + 3]])[0] for row in alone]))
        order = batch.remove([0])
        assert order == [3, 1, 2]
        for step in range(14):
            found = called(llama, batch, [[step + 9]] * 3)[:, -1]
            assert_close(found, mx.concatenate([called(llama, alone[row], [[step + 9]])[0] for row in order]))


def test_what_is_no_number_in_a_slot_that_another_row_gets_is_not_seen(llama: LoadedModel) -> None:
    """Whoever comes to the threshold there begins with a clear slot."""
    caches = read(llama, PROMPT[:40])[0]
    caches.join(read(llama, PROMPT[:40])[0])
    after = leaves(caches)[1]
    caches.remove([1])
    called(llama, caches, [[1]])
    for layer in caches.layers:
        planes = layer.after._planes
        planes.arrays = [
            mx.where(mx.arange(array.shape[0])[:, None, None, None] > 0, mx.array(float("nan")), array).astype(
                array.dtype
            )
            if array.dtype == mx.float32
            else array
            for array in planes.arrays
        ]
    assert mx.isnan(after.arrays[1]).any().item()
    caches.join(read(llama, PROMPT[: START - 2])[0])
    alone = read(llama, PROMPT[: START - 2])[0]
    for step in range(6):
        found = called(llama, caches, [[step], [step]])[1, -1:]
        assert_close(found, called(llama, alone, [[step]])[0])


@pytest.mark.parametrize("before", [START - 3, START - 1, START, START + 2])
def test_tokens_are_taken_back_across_it(llama: LoadedModel, before: int) -> None:
    """As speculation does, again and again, with counts that the host does not know yet."""
    caches, straight = read(llama, PROMPT[:before])[0], read(llama, PROMPT[:before])[0]
    caches.join(read(llama, PROMPT[:40])[0])
    straight.join(read(llama, PROMPT[:40])[0])
    for tokens, kept in (([9, 8, 7, 6, 5], 1), ([4, 3, 2], 2), ([1, 2, 3, 4, 5, 6], 5), ([3, 3, 3], 1)):
        caches.mark()
        found = called(llama, caches, [tokens, tokens])
        caches.keep(mx.array([kept, kept]))
        assert_close(found[:, :kept], called(llama, straight, [tokens[:kept]] * 2))
        again = called(llama, caches, [[11], [12]])
        caches.settle([len(tokens) - kept] * 2)
        assert_close(again, called(llama, straight, [[11], [12]]))


@pytest.mark.parametrize("length", [START - 6, START - 1, START, START + 1, 50])
def test_what_was_kept_of_a_row_is_what_it_was(llama: LoadedModel, length: int) -> None:
    """Beginnings that end before the threshold, at it and beyond; of a row that has come to it, and of one that has
    not, whose node then grows across it."""
    for lengths in ((60,), (length,), (START - 8, 60)):
        prefixes = PrefixCache(1 << 24)
        for stored in lengths:
            prefixes.store("", PROMPT[:stored], read(llama, PROMPT[:stored])[0], 0)
        hit = prefixes.look_up("", PROMPT[: length + 1])
        assert hit is not None
        assert hit.length == length
        assert all(piece.stop <= START or piece.start >= START for piece in hit.pieces)
        caches = llama.layout.restore([hit])
        found = called(llama, caches, [PROMPT[length : length + 9]])[0]
        assert_close(found, read(llama, PROMPT[: length + 9])[1][length:])


def test_rows_begin_with_different_beginnings(llama: LoadedModel) -> None:
    prefixes = PrefixCache(1 << 24)
    prefixes.store("", PROMPT, read(llama, PROMPT)[0], 0)
    hits = [prefixes.look_up("", PROMPT[: length + 1]) for length in (50, 12, START)]
    caches = llama.layout.restore([*hits, None])
    starts = [50, 12, START, 0]
    found = called(llama, caches, [PROMPT[at : at + 6] for at in starts])
    for row, at in enumerate(starts):
        assert_close(found[row], read(llama, PROMPT[: at + 6])[1][at:])


def test_what_has_been_restored_is_kept_again(llama: LoadedModel) -> None:
    """Also before anything was called of it."""
    prefixes = PrefixCache(1 << 24)
    prefixes.store("", PROMPT[:50], read(llama, PROMPT[:50])[0], 0)
    hit = prefixes.look_up("", PROMPT[:51])
    again = PrefixCache(1 << 24)
    again.store("", PROMPT[:50], llama.layout.restore([hit]), 0)
    caches = llama.layout.restore([again.look_up("", PROMPT[:46])])
    assert_close(called(llama, caches, [PROMPT[45:50]])[0], read(llama, PROMPT[:50])[1][45:])


def test_launches_see_what_operations_see_on_the_device_or_the_host(
    llama: LoadedModel, in_place: OnHost | OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows on both sides, of a row that comes to the threshold, and that is cut back; the kernels themselves."""
    packed = PackedOnHost() if isinstance(in_place, OnHost) else quantised_kernel.attend_and_write
    if isinstance(in_place, OnHost):
        CopiesOnHost(monkeypatch)
    launched = Layout(llama.model, 16, HOW, launch=in_place, packed_launch=packed)
    both = [(layout.new(), layout.new()) for layout in (launched, Layout(llama.model, 16, HOW))]
    for short, long in both:
        called(llama, short, [PROMPT[: START - 4]])
        called(llama, long, [PROMPT[:50]])
        short.join(long)
    found, expected = [], []
    for count, kept in ((1, 1), (1, 1), (3, 1), (3, 2), (1, 1), (5, 5), (1, 1)):
        for into, (caches, _) in zip((found, expected), both, strict=True):
            caches.mark()
            tokens = [[(7 * row + i) % 300 for i in range(count)] for row in range(2)]
            into.append(called(llama, caches, tokens)[:, :kept])
            caches.keep(mx.array([kept, kept]))
            caches.settle([count - kept] * 2)
    assert in_place.launches > 0
    assert_close(*(mx.concatenate(each, axis=1) for each in (found, expected)))
    for into, (caches, _) in zip((found, expected), both, strict=True):
        caches.remove([0])
        into[:] = [called(llama, caches, [[3, 2, 1]])]
    assert_close(found[0], expected[0])


def test_room_is_made_for_what_is_needed(llama: LoadedModel) -> None:
    """Nothing packed while no row comes to the threshold, nor when none is left; plain ones up to it alone."""
    caches = read(llama, PROMPT[: START - 2])[0]
    before, after = leaves(caches)
    assert after.arrays == []
    long = read(llama, PROMPT * 8, chunk=64)[0]
    assert leaves(long)[0].arrays[0].shape[2] <= START + 16
    caches.join(long)
    called(llama, caches, [[1], [2]])
    assert before.arrays[0].shape[:3:2] == (after.arrays[0].shape[0], START + 16)
    caches.remove([1])
    assert after.arrays == []
    assert_close(called(llama, caches, [[3, 4]])[0], read(llama, [*PROMPT[: START - 2], 1, 3, 4])[1][-2:])


def test_rows_that_stay_before_it_are_what_they_are_without(llama: LoadedModel, model_folder: ModelFolder) -> None:
    """To the bit: nothing else is computed."""
    plain = load(model_folder("llama", wide=True), slack=16)
    assert mx.array_equal(read(llama, PROMPT[:START])[1], read(plain, PROMPT[:START])[1])


def test_a_beginning_says_what_was_written(llama: LoadedModel) -> None:
    caches = read(llama, PROMPT[:30])[0]
    with pytest.raises(AssertionError):
        caches.piece(0, START - 1, START + 1)
    pieces = (caches.piece(0, 0, START), caches.piece(0, START, 30))
    restored = llama.layout.restore([Beginning(30, pieces)], reserve=100)
    assert restored.capacity >= 100
    assert_close(called(llama, restored, [[5]])[0], called(llama, caches, [[5]])[0])
