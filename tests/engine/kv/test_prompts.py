"""Models attend to prompts by launches without knowing of it, and say what they say without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine.batch import DecodeBatch
from runner.engine.kv import attention_kernel, masks, planes, prompt_kernel
from runner.engine.kv.attention import attend
from runner.engine.kv.calls import Call, Planes
from runner.engine.kv.layers import Straight
from runner.engine.kv.layout import Layout
from runner.engine.kv.masks import FEW
from runner.engine.kv.positions import Positions
from runner.engine.kv.window import Window
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import OnDevice, OnHost, separately
from tests.engine.kv.prompts_on_host import PromptsOnHost
from tests.engine.kv.test_unwritten import TEXT, Recorded, of_a_call
from tests.engine.speculative.drafts import SLACK, draft_folder, of_four_rows

Launched = OnDevice | PromptsOnHost


@pytest.fixture(scope="module")
def prompts_in_place(in_place: OnHost | OnDevice) -> Launched:
    """The kernels, where they can run; else their sources on the host."""
    if isinstance(in_place, OnDevice):
        return OnDevice(prompt_kernel.write_and_attend)
    return PromptsOnHost()


@pytest.fixture
def any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of MLX's operations, as models in float32 have them here, take calls that only 16 bits would get."""
    monkeypatch.setattr(prompt_kernel, "applies", lambda queries, *_: queries.shape[2] > FEW)


def on(monkeypatch: pytest.MonkeyPatch, launch: Any, prompt_launch: Any) -> None:
    """As if there were a device, and the switch on."""
    monkeypatch.setattr(attention_kernel, "launch", lambda: launch)
    monkeypatch.setattr(prompt_kernel, "launch", lambda: prompt_launch)


# ------------------------------------------------------------- engines


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma2"])
def test_a_model_is_tried_before_it_is_trusted_with_them(
    model_folder: ModelFolder,
    in_place: OnHost | OnDevice,
    prompts_in_place: Launched,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    on(monkeypatch, in_place, prompts_in_place)
    loaded = load(model_folder(model_type), dtype="bfloat16")
    # Upstream's gemma2 has an attention of its own.
    assert (loaded.layout.prompt_launch is prompts_in_place) == (model_type != "gemma2")
    assert loaded.layout.rotates == (model_type != "gemma2")
    lengths, before = [60, 33], prompts_in_place.launches
    tokens = mx.array([[(5 * row + i) % loaded.vocabulary for i in range(60)] for row in range(2)])
    plain, launched = Layout(loaded.model).new(2), loaded.layout.new(2)
    expected, found = (caches.call(loaded.model, tokens, lengths) for caches in (plain, launched))
    for row, length in enumerate(lengths):
        close = {"rtol": 0.1, "atol": 0.1 * mx.abs(expected).max().item()}
        assert mx.allclose(found[row, :length], expected[row, :length], **close).item()
    # gemma3's windows would have gone round: those layers take separate operations, and the others do not.
    assert prompts_in_place.launches - before == {"llama": 3, "gemma3_text": 2, "gemma2": 0}[model_type]


@pytest.mark.usefixtures("any_type")
def test_launches_that_fail_or_are_wrong_are_not_taken(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And those for few tokens still are."""

    def fails(call: Call) -> tuple[mx.array, Planes]:
        raise RuntimeError("Failed to compile kernel")

    def forgets(call: Call) -> tuple[mx.array, Planes]:
        return separately(call)[0], call.planes

    def starts_at_zero(call: Call) -> tuple[mx.array, Planes]:
        return separately(replace(call, starts=mx.zeros_like(call.starts)))

    for prompt_launch in (fails, forgets, starts_at_zero):
        on(monkeypatch, separately, prompt_launch)
        caplog.clear()
        layout = load(model_folder("llama")).layout
        assert layout.launch is separately
        assert layout.rotates
        assert layout.prompt_launch is None
        assert "prompts' attention takes separate operations" in caplog.text
    on(monkeypatch, separately, separately)
    assert load(model_folder("llama")).layout.prompt_launch is separately


def answers(loaded: LoadedModel, draft: Path) -> list[str]:
    """What rows say whose prompts are computed in chunks, together, and after prefixes; the draft's as well."""
    driver = of_four_rows(loaded, draft, 50)
    prompts = [TEXT[9 * i : 9 * i + length] for i, length in enumerate([21, 20, 70, 24, 110])]
    driver.run(generate(i, prompt=prompt, max_tokens=20) for i, prompt in enumerate(prompts))
    driver.run(generate(10 + i, prompt=[*prompt, *TEXT[:40]], max_tokens=20) for i, prompt in enumerate(prompts))
    return driver.texts


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_an_engine_says_the_same(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_type: str
) -> None:
    folder = model_folder(model_type)
    draft = draft_folder(folder, tmp_path / "draft", "perturbed")
    expected = answers(load(folder, slack=SLACK), draft)
    launch = Recorded()
    on(monkeypatch, separately, launch)
    loaded = load(folder, slack=SLACK)
    launch.calls.clear()
    assert answers(loaded, draft) == expected
    assert len(launch.calls) > 8
    assert {len(call.starts) for call in launch.calls} > {1}, "some together"


# ------------------------------------------------------------- a call


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU's own kernels may attend there")
@pytest.mark.usefixtures("any_type")
def test_a_layer_has_two_operations_for_eleven(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what is made once a call goes as well: the mask, and the places to write to."""

    def two(call: Call) -> tuple[mx.array, Planes]:
        parts = [call.keys, call.values, *call.planes, call.starts]
        (written,) = mx.depends([call.queries], parts)
        (attended,) = mx.depends([written], [*call.planes, call.starts])
        return attended, call.planes

    on(monkeypatch, separately, separately)
    llama = load(model_folder("llama"))
    tokens, lengths = mx.array([[1] * 20] * 3), [20, 4, 17]
    old, new = (
        of_a_call(llama, layout, tmp_path, tokens, lengths)
        for layout in (Layout(llama.model), Layout(llama.model, launch=two, prompt_launch=two, rotates=True))
    )
    layers = 3
    assert new["Depends"] == 2 * layers
    for name in ("RoPE", "ScatterAxis", "Softmax", "Select", "Arange"):
        assert not new[name], name
    assert new["Matmul"] + new["AddMM"] == old["Matmul"] + old["AddMM"] - 2 * layers
    assert (old - new).total() >= 9 * layers


def attention(
    launch: Any, mask_of: Callable[[Straight], masks.Mask], dtype: mx.Dtype, layer_of: Any = Straight, tokens: int = 20
) -> mx.array:
    """What 20 tokens a row see, in rows of 4 and of 2 tokens before: [2, 4, 20, 16]."""
    positions = Positions(2)
    layer: Straight = layer_of(positions, separately, launch)
    keys = iter(mx.random.split(mx.random.key(3), 5))
    draw = lambda heads, count: mx.random.normal((2, heads, count, 16), key=next(keys)).astype(dtype)  # noqa: E731
    positions.begin(4, [4, 2])
    layer.begin()
    layer.update_and_fetch(draw(2, 4), draw(2, 4))
    layer.end()
    positions.end()
    positions.begin(tokens, None)
    layer.begin()
    fetched = layer.update_and_fetch(draw(2, tokens), draw(2, tokens))
    attended = attend(draw(4, tokens), *fetched, layer, 0.25, mask_of(layer))
    layer.end()
    positions.end()
    return attended


OWN: dict[str, tuple[bool, Callable[[Straight], masks.Mask]]] = {
    "the cache's": (True, lambda layer: layer.make_mask(20)),
    "the cache's, of a window": (True, lambda layer: layer.make_mask(20, window_size=3)),
    "one of the model's own": (False, lambda layer: layer.make_mask(20, return_array=True) & (mx.arange(24) != 1)),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_only_what_the_kernels_understand_is_launched(name: str, dtype: mx.Dtype) -> None:
    own, mask_of = OWN[name]
    launch = Recorded()
    found, expected = attention(launch, mask_of, dtype), attention(None, mask_of, dtype)
    close = 3e-2 if dtype == mx.bfloat16 else 1e-4
    assert mx.allclose(found, expected, rtol=close, atol=close).item()
    assert len(launch.calls) == (own and dtype == mx.bfloat16)


@pytest.mark.parametrize(("window", "launched"), [(24, True), (20, True), (19, False)])
def test_a_ring_must_not_have_to_go_round(window: int, launched: bool) -> None:
    """With four places beyond its window, and 24 tokens after the call."""
    launch = Recorded()
    ring = lambda positions, few, wide: Window(positions, window, 4, few, wide)  # noqa: E731
    mask_of = lambda layer: layer.make_mask(20, True, window)  # noqa: E731
    found = attention(launch, mask_of, mx.bfloat16, ring)
    assert mx.allclose(found, attention(None, mask_of, mx.bfloat16, ring), rtol=3e-2, atol=3e-2).item()
    assert [call.window for call in launch.calls] == [window] * launched


# ------------------------------------------------------------- who else is at the planes


@pytest.mark.usefixtures("any_type")
def test_launches_of_either_kind_wait_for_the_one_before(llama: LoadedModel) -> None:
    launch = Recorded()
    caches = Layout(llama.model, launch=launch, prompt_launch=launch).new(2)
    for count in (3, 20, 1, 30, 30):
        caches.call(llama.model, mx.array([[1] * count, [2] * count]))
    assert [call.queries.shape[2] for call in launch.calls[::3]] == [3, 20, 1, 30, 30]
    assert [call.after for call in launch.calls[:3]] == [None] * 3
    assert all(call.after is before for call, before in zip(launch.calls[3:], launch.returned, strict=False))
    held = caches.arrays
    assert all(any(array is other for other in held) for array in launch.returned[-3:])


@pytest.mark.usefixtures("any_type")
def test_whoever_is_at_the_planes_after_a_prompt_finds_what_was_written(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[mx.array] = []
    monkeypatch.setattr(planes, "start", started.append)
    launch = Recorded()
    caches = Layout(llama.model, launch=launch, prompt_launch=launch).new(1)
    caches.call(llama.model, mx.array([[1] * 20]))
    caches.piece(0, 0, 2)
    assert all(any(array is other for other in started) for array in launch.returned)


@pytest.mark.usefixtures("any_type")
def test_prompts_that_join_a_batch_are_not_started_again(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was started with the prompt's call need not be for each layer that is copied into the batch's."""
    on(monkeypatch, separately, separately)
    loaded = load(model_folder("llama"))
    driver = Driver(loaded, max_rows=4, prefix_cache_bytes=0)
    started: list[mx.array] = []
    joins: list[int] = []
    join = DecodeBatch.join

    def watched(batch: DecodeBatch, rows: Any, caches: Any, soon: int = 0) -> None:
        started.clear()
        if batch.rows:
            batch.caches.dispatched()  # the batch's own are another matter
        join(batch, rows, caches, soon)
        joins.append(len(started))

    monkeypatch.setattr(planes, "start", started.append)
    monkeypatch.setattr(DecodeBatch, "join", watched)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=list(range(1, 30 + i)), max_tokens=8))
        driver.engine.step()
    driver.run([])
    assert len(joins) > 1
    assert not any(joins)
