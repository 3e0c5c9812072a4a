"""Rows come, go and begin with what was kept in a launch or two, and compute what they compute alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.kv import attention_kernel, copy_kernel, moves, planes, quantised_kernel
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.kv.moves import Moves
from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.copies_on_host import CopiesOnHost
from tests.engine.kv.launches import (
    OnDevice,
    OnHost,
    packed_separately,
    separately,
)
from tests.engine.kv.test_caches import SLACK, Rows, follow
from tests.engine.kv.test_unwritten import TEXT, Recorded
from tests.engine.speculative.drafts import draft_folder, of_four_rows


def filled(model: LoadedModel, layout: Layout, lengths: list[int], room: int = 0) -> Caches:
    caches = layout.new(len(lengths))
    caches.reserve(room)
    prompts = [[(7 * i + j) % model.vocabulary for j in range(max(lengths))] for i in range(len(lengths))]
    mx.eval(caches.call(model.model, mx.array(prompts), lengths), caches.arrays)
    return caches


def held(caches: Caches) -> list[list[mx.array]]:
    """What each layer has of each row, apart from anything that is written later."""
    return [
        [mx.array(plane[row, :, : caches.length(row)]) for layer in caches.layers for plane in layer._planes.arrays]
        for row in range(caches.rows)
    ]


def same(a: list[mx.array], b: list[mx.array]) -> bool:
    return all(mx.array_equal(*both).item() for both in zip(a, b, strict=True))


# ------------------------------------------------------------- what they cost


LAYOUTS: dict[str, Callable[[Any], Layout]] = {
    "plain": lambda model: Layout(model, launch=separately),
    "packed": lambda model: Layout(
        model, quantisation=Quantisation(8, 64), launch=separately, packed_launch=packed_separately
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_join_and_leave_in_two_launches_for_planes_that_are_alike(
    model_folder: ModelFolder, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """However many rows and layers there are; and none of MLX's operations copies any."""
    model = load(model_folder("llama", wide=True))
    layout = LAYOUTS[name](model.model)
    batch, other = filled(model, layout, [50, 300, 20, 41]), filled(model, layout, [60, 33])
    expected = [*held(batch), *held(other)]
    for way in ("paste", "clear", "lift", "put"):
        monkeypatch.setattr(planes.Planes, way, None)
    starts: list[Any] = []
    monkeypatch.setattr(moves, "start", lambda *trees: (starts.append(trees), mx.async_eval(*trees)))
    alike = {"plain": [6], "packed": [6, 12]}[name]
    batch.join(other)
    assert on_host.copied == on_host.put == alike
    assert len(starts) == 1
    assert all(map(same, held(batch), expected))

    order = batch.remove([1, 0])
    assert order == [4, 5, 2, 3]
    assert on_host.copied == on_host.put == 2 * alike
    assert len(starts) == 2
    assert all(same(row, expected[i]) for row, i in zip(held(batch), order, strict=True))
    batch.remove([3])
    assert len(starts) == 2, "the last row leaves nothing to move"


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_row_begins_with_is_put_in_one_launch_for_planes_that_are_alike(
    model_folder: ModelFolder, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = load(model_folder("llama", wide=True))
    layout = LAYOUTS[name](model.model)
    caches = filled(model, layout, [5, 60])
    (_, expected) = held(caches)
    kept = [Beginning(length, (caches.piece(1, 0, 30), caches.piece(1, 30, 60))) for length in (60, 60, 44)]
    kept[1] = kept[0]
    monkeypatch.setattr(planes.Planes, "paste", None)
    starts: list[Any] = []
    monkeypatch.setattr("runner.engine.kv.caches.start", starts.append)
    restored = layout.restore([None, *kept])
    assert len(starts) == 1
    # Twice two pieces: the first two rows begin with the very same.
    assert on_host.put == {"plain": [6], "packed": [6, 12]}[name] * 4
    for row, length in ((1, 60), (2, 60), (3, 44)):
        assert same(held(restored)[row], [plane[:, :length] for plane in expected])
    for layer in restored.layers:
        for plane in layer._planes.arrays:
            assert not plane[0].any().item()
            assert not plane[3, :, 44:].any().item()


def test_many_rows_go_some_at_a_time(
    llama: LoadedModel, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_kernel, "rows_at_once", lambda _: 2)
    monkeypatch.setattr(copy_kernel, "MOST", 4)
    layout = Layout(llama.model, launch=separately)
    batch, other = filled(llama, layout, [5]), filled(llama, layout, [60, 33, 7])
    expected = [*held(batch), *held(other)]
    batch.join(other)
    assert on_host.put == [4, 4, 2, 2]
    assert all(map(same, held(batch), expected))


# ------------------------------------------------------------- that they are sound


def test_what_a_row_has_left_behind_is_cleared(llama: LoadedModel, on_host: CopiesOnHost) -> None:
    """Separate operations multiply it with zeros, and infinities would spread."""
    layout = Layout(llama.model, launch=separately)
    batch = filled(llama, layout, [40, 40, 300])
    for layer in batch.layers:
        layer.keys = layer.keys.at[1].add(float("inf"))
    assert batch.remove([1]) == [0, 2]
    batch.join(filled(llama, layout, [3]))
    assert on_host.put
    for layer in batch.layers:
        for plane in layer._planes.arrays:
            assert not plane[1, :, 300:].any().item()
            assert not plane[2, :, 3:].any().item()


def test_only_what_can_be_taken_is(llama: LoadedModel, on_host: CopiesOnHost) -> None:
    plane = mx.zeros((2, 2, 256, 16))
    some = Moves([0], [1], 9)
    assert some.take([plane], [plane])
    assert not some.take([plane], [plane.astype(mx.bfloat16)])
    assert not Moves([0], [1], 0).take([plane], [plane])
    plain = Layout(llama.model)
    batch = filled(llama, plain, [5, 9])
    batch.join(filled(llama, plain, [7]))
    batch.remove([0])
    assert not on_host.launches, "layers that no launch writes to are MLX's alone"


def test_a_ring_has_no_more_than_its_places(on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens went through it."""
    spans: list[int] = []
    copy = copy_kernel.copy
    monkeypatch.setattr(copy_kernel, "copy", lambda ring, rows, a, b: (spans.append(b), copy(ring, rows, a, b))[1])
    ring, into = mx.random.normal((2, 2, 9, 16)), mx.ones((3, 2, 12, 16))
    mx.eval(into)
    some = Moves([1], [2], 500)
    assert some.take([ring], [into])
    some.start()
    assert spans == [9]
    assert mx.array_equal(into[2, :, :9], ring[1]).item()
    assert not into[2, :, 9:].any().item()
    assert (into[:2] == 1).all().item()
    assert on_host.put == [1]


def test_launches_before_are_dispatched_and_these_at_once(
    llama: LoadedModel, on_host: CopiesOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    launch = Recorded()
    layout = Layout(llama.model, launch=launch)
    for name in ("copy", "put"):
        made = getattr(copy_kernel, name)
        monkeypatch.setattr(copy_kernel, name, lambda *a, made=made, name=name: (events.append(name), made(*a))[1])
    monkeypatch.setattr(planes, "start", lambda array: events.append(id(array)))
    monkeypatch.setattr(moves, "start", lambda _: events.append("started"))
    batch, other = layout.new(2), layout.new(1)
    batch.call(llama.model, mx.array([[1, 2], [3, 4]]))
    other.call(llama.model, mx.array([[5, 6]]))
    launched = {id(array) for array in launch.returned}
    assert len(launched) == 6
    batch.join(other)
    assert set(events[:6]) == launched
    assert events[6:] == ["copy", "put", "started"]
    del events[:], launch.returned[:]
    batch.call(llama.model, mx.array([[1], [2], [3]]))
    batch.remove([0])
    assert set(events[:3]) == {id(array) for array in launch.returned}
    assert events[3:] == ["copy", "put", "started"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 12))])
def test_rows_compute_what_they_compute_alone(
    model_folder: ModelFolder, in_place: OnHost | OnDevice, on_host: CopiesOnHost, kind: str, seed: int
) -> None:
    """Rings as well, in which positions go round."""
    model = load(model_folder(kind))
    follow(Rows(model, Layout(model.model, SLACK, launch=in_place), random.Random(seed)), 24)
    assert len(on_host.put) > 1


@pytest.mark.usefixtures("arrays_on_the_host")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_an_engine_says_the_same(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_type: str
) -> None:
    """With a draft, where there can be one: its caches are moved as well."""
    folder = model_folder(model_type)
    draft = draft_folder(folder, tmp_path / "draft", "perturbed")

    def answers() -> list[str]:
        loaded = load(folder, slack=SLACK)
        driver = of_four_rows(loaded, draft, 16)
        requests = [generate(i, prompt=TEXT[: 9 + 11 * i], max_tokens=6 + 5 * (i % 3)) for i in range(6)]
        driver.run(requests)
        driver.run([generate(10 + i, prompt=TEXT[: 42 + 11 * i], max_tokens=9) for i in range(2)])
        return driver.texts

    expected = answers()
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    on_host = CopiesOnHost(monkeypatch)
    assert answers() == expected
    assert len(on_host.put) > 4


@pytest.mark.usefixtures("arrays_on_the_host")
def test_an_engine_with_packed_keys_says_the_same(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    monkeypatch.setattr(quantised_kernel, "launch", lambda: packed_separately)

    def answers() -> list[str]:
        loaded = load(model_folder("llama", wide=True), quantisation=Quantisation(8, 64))
        assert loaded.layout.packed_launch is packed_separately
        driver = Driver(loaded, max_rows=3, prefill_step_size=32, prefix_cache_bytes=1 << 24)
        for first in (0, 10):
            driver.run([generate(first + i, prompt=TEXT[: 9 + 11 * i], max_tokens=4 + 3 * (i % 3)) for i in range(5)])
        return driver.texts

    expected = answers()
    on_host = CopiesOnHost(monkeypatch)
    assert answers() == expected
    assert {6, 12} <= {*on_host.put}
