"""Models write and attend in one launch without knowing of it, and say what they say without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine import cuda_kernels
from runner.engine.kv import attention_kernel, masks, planes
from runner.engine.kv.attention import attend
from runner.engine.kv.caches import Caches
from runner.engine.kv.calls import Call, Planes
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layers import Straight
from runner.engine.kv.layout import Layout
from runner.engine.kv.positions import Positions
from runner.engine.kv.window import Window
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import generate
from tests.engine.kv.launches import OnDevice, OnHost, separately
from tests.engine.operations import one, operations
from tests.engine.speculative.drafts import SLACK, draft_folder, of_four_rows
from tests.engine.tiny import CONFIGS, encode

TEXT = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main():") * 2
WINDOW = 24
"""Of the tiny gemma3."""


@pytest.fixture
def on(in_place: OnHost | OnDevice, monkeypatch: pytest.MonkeyPatch) -> OnHost | OnDevice:
    """As if there were a device, and the switch on."""
    monkeypatch.setattr(attention_kernel, "launch", lambda: in_place)
    return in_place


# ------------------------------------------------------------- engines


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_model_is_tried_before_it_is_trusted_with_it(
    model_folder: ModelFolder, on: OnHost | OnDevice, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(model_folder(model_type))
    # Upstream's gemma2 has an attention of its own.
    assert (loaded.layout.launch is on) == (model_type != "gemma2")
    assert ("attention takes separate operations" in caplog.text) == (model_type == "gemma2")
    assert loaded.batches == (model_type != "gemma2")
    assert loaded.layout.rotates == (model_type != "gemma2"), "and with leaving its rotations to it"


def test_a_launch_that_fails_or_is_wrong_is_not_taken(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(call: Call) -> tuple[mx.array, Planes]:
        raise RuntimeError("Failed to compile kernel")

    def forgets(call: Call) -> tuple[mx.array, Planes]:
        return separately(call)[0], call.planes

    for launch in (fails, forgets):
        monkeypatch.setattr(attention_kernel, "launch", lambda launch=launch: launch)
        loaded = load(model_folder("llama"))
        assert loaded.layout.launch is None
        assert loaded.batches


def test_it_is_on_where_there_is_a_device_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(cuda_kernels, "usable", cuda_kernels.usable.__wrapped__)
    assert attention_kernel.launch() is attention_kernel.attend_and_write
    monkeypatch.setenv(attention_kernel.SWITCH, "0")
    assert attention_kernel.launch() is None


def answers(loaded: LoadedModel, draft: Path) -> list[str]:
    """What rows say that come and go, in rounds of speculation and plain steps, some from a kept prefix."""
    driver = of_four_rows(loaded, draft, 16)
    samplings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 7}, {}]
    requests = [generate(i, prompt=TEXT[: 9 + 11 * i], max_tokens=12 + 7 * i, **samplings[i % 3]) for i in range(4)]
    driver.run(requests)
    # The same again, and further: with a window that has gone round since what was kept.
    driver.run([generate(10 + i, prompt=TEXT[: 42 + 11 * i], max_tokens=30) for i in range(2)])
    return driver.texts


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_an_engine_says_the_same(
    model_folder: ModelFolder,
    in_place: OnHost | OnDevice,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_type: str,
) -> None:
    folder = model_folder(model_type)
    draft = draft_folder(folder, tmp_path / "draft", "perturbed")
    expected = answers(load(folder, slack=SLACK), draft)
    before = in_place.launches
    monkeypatch.setattr(attention_kernel, "launch", lambda: in_place)
    assert answers(load(folder, slack=SLACK), draft) == expected
    assert in_place.launches > before + 50


# ------------------------------------------------------------- a step


def of_a_call(
    model: LoadedModel, layout: Layout, scratch: Path, tokens: mx.array | None = None, lengths: list[int] | None = None
) -> Counter[str]:
    """Operations of a call of rows of different lengths: of a step, if it says no `tokens`."""
    caches = layout.new(3)
    mx.eval(caches.call(model.model, mx.array([[1] * 20] * 3), [20, 4, 9]), caches.arrays)
    return operations(scratch, caches.call(model.model, mx.array([[1]] * 3) if tokens is None else tokens, lengths))


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal's own kernel attends there")
def test_a_layer_has_one_operation_for_five(llama: LoadedModel, tmp_path: Path) -> None:
    """For seven where the queries are not scaled, and the mask is not added, by a product: that is so on a GPU. And for
    eight launches there: a scatter copies values that are not contiguous."""
    old = of_a_call(llama, Layout(llama.model), tmp_path)
    new = of_a_call(llama, Layout(llama.model, launch=one), tmp_path)
    layers = 3
    gone = Counter({"ScatterAxis": 2, "AddMM": 1, "Matmul": 1, "Softmax": 1})
    of_layers = Counter({name: count * layers for name, count in gone.items()})
    assert new - old == Counter({"Depends": layers})
    assert of_layers <= old - new
    # What is made once a step goes as well: the mask, and the places to write to.
    assert (old - new - of_layers).total() < 12


# ------------------------------------------------------------- masks


def attention(launch: Any, mask_of: Callable[[Straight], masks.Mask], sinks: mx.array | None = None) -> mx.array:
    """[2, 4, 2, 16]: what two tokens a row see, in rows of 4 and of 2 tokens before."""
    positions = Positions(2)
    layer = Straight(positions, launch)
    keys = iter(mx.random.split(mx.random.key(3), 5))
    draw: Callable[[int, int], mx.array] = lambda heads, count: mx.random.normal((2, heads, count, 16), key=next(keys))  # noqa: E731
    positions.begin(4, [4, 2])
    layer.begin()
    layer.update_and_fetch(draw(2, 4), draw(2, 4))
    layer.end()  # nobody has attended to them
    positions.end()
    positions.begin(2, None)
    layer.begin()
    fetched = layer.update_and_fetch(draw(2, 2), draw(2, 2))
    attended = attend(draw(4, 2), *fetched, layer, 0.25, mask_of(layer), sinks)
    layer.end()
    positions.end()
    return attended


OWN: dict[str, tuple[bool, Callable[[Straight], masks.Mask]]] = {
    "the cache's": (True, lambda layer: layer.make_mask(2)),
    "the cache's, of a window": (True, lambda layer: layer.make_mask(2, window_size=3)),
    "one of the model's own": (False, lambda layer: layer.make_mask(2, return_array=True) & (mx.arange(6) != 1)),
    "none": (False, lambda _: None),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("sinks", [False, True])
def test_only_masks_of_the_caches_are_understood(in_place: OnHost | OnDevice, name: str, sinks: bool) -> None:
    launched, mask_of = OWN[name]
    bias = mx.array([0.5, 1.0, -1.0, 2.0]) if sinks else None
    before = in_place.launches
    found, expected = attention(in_place, mask_of, bias), attention(None, mask_of, bias)
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5).item()
    assert in_place.launches - before == (launched and not sinks)


@pytest.mark.parametrize(("window", "launched"), [(None, True), (6, True), (5, True), (7, False)])
def test_a_ring_shows_no_more_than_its_window(in_place: OnHost | OnDevice, window: int | None, launched: bool) -> None:
    positions = Positions(1)
    layer = Window(positions, 6, 2, in_place)
    before = in_place.launches
    positions.begin(1, None)
    layer.begin()
    new = mx.ones((1, 2, 1, 16))
    attend(mx.ones((1, 4, 1, 16)), *layer.update_and_fetch(new, new), layer, 0.25, layer.make_mask(1, True, window))
    assert in_place.launches - before == launched


def test_other_types_than_those_held_are_converted(in_place: OnHost | OnDevice) -> None:
    """As an adapter of higher precision might make them."""
    positions = Positions(1)
    layer = Straight(positions, in_place)
    before = in_place.launches
    for dtype in (mx.bfloat16, mx.float32):
        positions.begin(1, None)
        layer.begin()
        queries, new = mx.ones((1, 4, 1, 16), dtype=dtype), mx.full((1, 2, 1, 16), 3.0, dtype=dtype)
        attended = attend(queries, *layer.update_and_fetch(new, new), layer, 0.25, layer.make_mask(1))
        layer.end()
        positions.end()
    assert in_place.launches == before + 1
    assert mx.allclose(attended, mx.array(3.0)).item()
    assert layer.keys.dtype == mx.bfloat16


# ------------------------------------------------------------- who else is at the planes


class Recorded:
    """Lazy launches, and what they have returned."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.returned: list[mx.array] = []

    def __call__(self, call: Call) -> tuple[mx.array, Planes]:
        attended, written = separately(call)
        self.calls.append(call)
        self.returned.append(attended)
        return attended, written


def joined(model: LoadedModel, caches: Caches) -> None:
    other = model.layout.new(1)
    other.call(model.model, mx.array([[1] * 20]))
    caches.join(other)


DOINGS: dict[str, Callable[[LoadedModel, Caches], object]] = {
    "piece": lambda _, caches: caches.piece(0, 0, 2),
    "leave": lambda _, caches: caches.remove([0]),
    "join": joined,
    "grow": lambda model, caches: (caches.reserve(2000), caches.call(model.model, mx.array([[1], [2]]))),
    "a wide call": lambda model, caches: caches.call(model.model, mx.array([[1] * 20, [2] * 20])),
    "keys": lambda _, caches: [layer.keys for layer in caches.layers],
}


def between(array: mx.array, arrays: list[mx.array]) -> bool:
    return any(array is other for other in arrays)


@pytest.mark.parametrize("name", DOINGS)
def test_whoever_else_is_at_the_planes_finds_what_was_written(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    started: list[mx.array] = []
    monkeypatch.setattr(planes, "start", started.append)
    launch = Recorded()
    caches = Layout(llama.model, launch=launch).new(2)
    caches.call(llama.model, mx.array([[1, 2, 3], [4, 5, 0]]), [3, 2])
    launched = list(launch.returned)
    assert len(launched) == 3
    assert not started
    assert all(between(array, caches.arrays) for array in launched), "whoever starts the arrays starts them"
    DOINGS[name](llama, caches)
    assert all(between(array, started) for array in launched)


def test_a_launch_waits_for_the_one_before(llama: LoadedModel) -> None:
    launch = Recorded()
    caches = Layout(llama.model, launch=launch).new(2)
    for _ in range(3):
        caches.call(llama.model, mx.array([[1], [2]]))
    assert [call.after for call in launch.calls[:3]] == [None] * 3
    assert all(call.after is before for call, before in zip(launch.calls[3:], launch.returned, strict=False))


def test_what_is_kept_of_a_ring_stays_as_it_is(model_folder: ModelFolder, on: OnHost | OnDevice) -> None:
    """Though it goes on being written in place, in the row that it was kept of and in those that began with it."""
    loaded = load(model_folder("gemma3_text"), slack=2)
    prompt = [(11 * i) % loaded.vocabulary for i in range(60)]
    # A piece before the ring has gone round, and a state when it has; all of it, of the only row.
    for length in (WINDOW + 2, 40):
        caches = loaded.layout.new()
        caches.call(loaded.model, mx.array([prompt[:length]]))
        mx.eval(caches.arrays)
        kept = Beginning(length, (caches.piece(0, 0, length),), caches.state(0))
        mx.eval(kept.pieces[0].arrays)
        expected = loaded.model(mx.array([[*prompt[:length], 5]]))[0, -1]
        for _ in range(3):
            for token in range(WINDOW + 4):
                mx.eval(caches.call(loaded.model, mx.array([[token]])))
            caches = loaded.layout.restore([kept])
            assert mx.allclose(caches.call(loaded.model, mx.array([[5]]))[0, -1], expected, rtol=1e-3, atol=1e-3).item()
