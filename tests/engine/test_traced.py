"""Steps whose graphs are kept say what steps say that are built each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine import traced
from runner.engine.arrays import to_list
from runner.engine.kv import attention_kernel, prompt_kernel, quantised_kernel
from runner.engine.kv.masks import FEW
from runner.engine.kv.positions import Positions
from runner.engine.kv.quantised import Quantisation
from runner.engine.kv.quantised_kernel import PackedCall
from runner.engine.loader import LoadedModel, load
from runner.engine.sharing import Sharing
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.kv.launches import packed_separately, separately
from tests.engine.speculative.drafts import SLACK, always, draft_folder, erratic, speculating
from tests.engine.tiny import encode

TEXT = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main():") * 2


class Graphs:
    """What `mx.compile` was asked for, for tokens of which shapes it was called, and how often a model was to build
    a graph."""

    def __init__(self) -> None:
        self.kept = 0
        self.calls = 0
        self.traced = 0
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.failing = False

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As `mx.compile`, or failing as it may."""
        self.kept += 1

        def tracing(*arguments: Any) -> Any:
            self.traced += 1
            result = function(*arguments)
            if self.failing:
                raise ValueError("not allowed inside a graph transformation")
            return result

        compiled = mx.compile(tracing)

        def call(*arguments: Any) -> Any:
            self.calls += 1
            self.shapes[arguments[0].shape] += 1
            return compiled(*arguments)

        return call


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Launches by MLX's own operations, as if there were a device."""
    found = Graphs()
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    monkeypatch.setattr(traced, "compiled", found.compile)
    return found


@pytest.fixture
def keeping() -> Iterator[None]:
    """Graphs are really kept, which the tests' environment turns off."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def answers(loaded: LoadedModel, draft: Path | None, adapters: list[AdapterSource], tokens: int = 20) -> list[str]:
    """What rows say that come and go, with and without adapters, plain or in rounds of speculation."""
    speculation = None if draft is None else speculating(loaded, draft, erratic())
    driver = Driver(loaded, speculation=speculation, max_rows=4, prefix_cache_bytes=1 << 24, num_draft_tokens=3)
    keys = ["", *(driver.engine.load_adapter(source).key for source in adapters)]
    samplings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 7}]
    for first in (0, 10):
        driver.run(
            [
                generate(
                    first + i,
                    prompt=TEXT[: 9 + 11 * i],
                    max_tokens=tokens + 7 * i,
                    adapter=keys[i % len(keys)],
                    **samplings[i % 2],
                )
                for i in range(4)
            ]
        )
        for source in adapters[:1]:
            driver.engine.drop_adapter(source.key)
            keys = [key for key in keys if key != source.key]
    return driver.texts


def sources(loaded: LoadedModel, scratch: Path) -> list[AdapterSource]:
    """Two adapters."""
    shapes = linear_shapes(loaded, ("q_proj", "v_proj", "down_proj"))
    return [
        AdapterSource(name, str(write_mlx(scratch / name, draw(shapes, 4, seed), keys=None, scale=2.0)))
        for seed, name in enumerate(("a", "b"))
    ]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "lfm2"])
@pytest.mark.parametrize("drafted", [False, True])
def test_rows_say_the_same(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    model_type: str,
    drafted: bool,
) -> None:
    if drafted and model_type == "lfm2":
        pytest.skip("recurrent states take nothing back")
    folder = model_folder(model_type)
    draft = draft_folder(folder, tmp_path / "draft", "perturbed") if drafted else None
    adapters = sources(load(folder), tmp_path)
    found = answers(load(folder, slack=SLACK), draft, adapters)
    assert graphs.calls > 20
    monkeypatch.setattr(attention_kernel, "launch", lambda: None)
    graphs.calls = 0
    assert found == answers(load(folder, slack=SLACK), draft, adapters)
    assert not graphs.calls


@pytest.mark.parametrize(
    "how",
    [
        Quantisation(4, 32),
        pytest.param(Quantisation(8, 32), marks=pytest.mark.nightly),
        Quantisation(8, 32, 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("drafted", [False, True])
def test_rows_of_few_bits_say_the_same(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    how: Quantisation,
    drafted: bool,
) -> None:
    folder = model_folder("llama", wide=True)
    draft = draft_folder(folder, tmp_path / "draft", "perturbed") if drafted else None
    monkeypatch.setattr(quantised_kernel, "launch", lambda: packed_separately)
    loaded = load(folder, slack=SLACK, quantisation=how)
    assert loaded.layout.packed_launch is packed_separately
    adapters = sources(loaded, tmp_path)
    found = answers(loaded, draft, adapters)
    assert graphs.calls > 20
    monkeypatch.setattr(attention_kernel, "launch", lambda: None)
    monkeypatch.setattr(quantised_kernel, "launch", lambda: None)
    graphs.calls = 0
    plain = load(folder, slack=SLACK, quantisation=how)
    assert plain.layout.packed_launch is None
    assert found == answers(plain, draft, adapters)
    assert not graphs.calls


@pytest.mark.usefixtures("keeping")
def test_a_graph_is_of_one_side_of_a_threshold(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, graphs: Graphs
) -> None:
    """Before it, with rows on both sides, and beyond it; only the call in which a row comes to it is built anew."""
    monkeypatch.setattr(quantised_kernel, "launch", lambda: packed_separately)
    loaded = load(model_folder("llama", wide=True), quantisation=Quantisation(8, 32, 40))
    call = traced.TracedCalls(loaded.model)
    caches, other = loaded.layout.new(), loaded.layout.new()
    for rows, prompt in ((caches, TEXT[:10]), (other, TEXT[:20])):
        rows.reserve(100)
        mx.eval(rows.call(loaded.model, mx.array([prompt])), rows.arrays)
    caches.join(other)
    built = []
    for step in range(60):
        before = graphs.calls
        mx.eval(call(caches, mx.array([[step], [step + 1]])), caches.arrays)
        caches.dispatched()
        built.append(graphs.calls == before)
    assert graphs.kept == graphs.traced == 3
    # Two of each side before a graph is kept, and those in which a row turns.
    assert [step for step, anew in enumerate(built) if anew] == [0, 1, 20, 21, 22, 30, 31, 32]
    plain = load(model_folder("llama", wide=True), quantisation=Quantisation(8, 32, 40))
    assert plain.layout.packed_launch is packed_separately
    found = plain.layout.new()
    logits = found.call(plain.model, mx.array([[*TEXT[:10], *range(60)]]))[:, -1]
    last = caches.call(loaded.model, mx.array([[60], [61]]))[:1, -1]
    assert mx.allclose(found.call(plain.model, mx.array([[60]]))[:, -1], last, atol=1e-3)
    assert not mx.allclose(logits, last, atol=1e-3)


def test_a_packed_launch_that_is_wrong_is_not_taken(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forgets(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
        return packed_separately(call)[0], call.planes

    monkeypatch.setattr(quantised_kernel, "launch", lambda: forgets)
    loaded = load(model_folder("llama", wide=True), quantisation=Quantisation(8, 32))
    assert loaded.layout.packed_launch is None
    assert loaded.batches
    assert "packed keys take separate operations" in caplog.text
    assert "off what the model says" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_trial_of_packed_launches_compiles_what_is_used(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    seen = set()

    def noted(call: PackedCall) -> tuple[mx.array, Sequence[mx.array]]:
        seen.add((call.bits, call.group_size, call.window, call.rotation is None))
        return packed_separately(call)

    monkeypatch.setattr(quantised_kernel, "launch", lambda: noted)
    loaded = load(model_folder("llama", wide=True), quantisation=Quantisation(bits, 32))
    assert loaded.layout.packed_launch is noted
    assert seen == {(bits, 32, None, True)}


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("drafted", [False, True])
def test_a_graph_is_built_once_and_used_again(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    drafted: bool,
) -> None:
    folder = model_folder("llama")
    draft = draft_folder(folder, tmp_path / "draft", "perturbed") if drafted else None
    adapters = sources(load(folder), tmp_path)
    found = answers(load(folder, slack=SLACK), draft, adapters, tokens=60)
    assert "built each time" not in caplog.text
    assert graphs.kept == graphs.traced
    assert graphs.calls > 3 * graphs.traced
    monkeypatch.setattr(attention_kernel, "launch", lambda: None)
    assert found == answers(load(folder, slack=SLACK), draft, adapters, tokens=60)


def answers_of_many(loaded: LoadedModel, adapters: list[AdapterSource], keys: int) -> list[str]:
    """What nine rows say that leave one after the other, while others join, with so many adapters in turn."""
    driver = Driver(loaded, max_rows=12, prefix_cache_bytes=0)
    known = ["", *(driver.engine.load_adapter(source).key for source in adapters)][:keys]
    driver.run(
        generate(
            i, prompt=TEXT[i : 2 * i + 5], max_tokens=6 + 5 * i, adapter=known[i % keys], temperature=i % 2, seed=i
        )
        for i in range(9)
    )
    driver.run(generate(20 + i, prompt=TEXT[i : i + 9], max_tokens=40 - 3 * i, adapter=known[-1]) for i in range(9))
    return driver.texts


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_batches_of_like_sizes_share_a_graph(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    model_type: str,
    keys: int,
) -> None:
    folder = model_folder(model_type)
    adapters = sources(load(folder), tmp_path)
    found = answers_of_many(load(folder), adapters, keys)
    # Nine rows have ten slots.
    assert {rows for rows, count in graphs.shapes if count == 1} <= {1, 2, 4, 8, 10}
    assert graphs.calls > 50
    monkeypatch.setattr(attention_kernel, "launch", lambda: None)
    assert found == answers_of_many(load(folder), adapters, keys)


def answers_to_prompts(loaded: LoadedModel, adapters: list[AdapterSource]) -> list[str]:
    """What rows say whose prompts are of few shapes, but not of one length: six pairs of up to 32 tokens that share a
    call, and five of two chunks of 64 and one of up to 32."""
    sharing = Sharing(multiple=32)
    driver = Driver(loaded, max_rows=4, prefix_cache_bytes=0, prefill_step_size=64, sharing=sharing)
    keys = ["", *(driver.engine.load_adapter(source).key for source in adapters)]
    text = TEXT * 5
    for i in range(6):
        pair = enumerate((text[i : i + 32], text[50 + i : 75 + 2 * i]))
        driver.run(generate(10 * i + j, prompt=prompt, max_tokens=8, adapter=keys[-j]) for j, prompt in pair)
    for i in range(5):
        driver.run([generate(100 + i, prompt=text[i : 150 + 3 * i], max_tokens=8)])
    return driver.texts


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize(
    ("model_type", "pairs", "chunks", "ends"),
    [("llama", 4, 8, 3), ("qwen3_moe", 4, 8, 3), ("gemma3_text", 0, 0, 0), ("lfm2", 0, 3, 0)],
)
def test_prompts_of_a_shape_have_a_graph(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    model_type: str,
    pairs: int,
    chunks: int,
    ends: int,
) -> None:
    """Wherever they begin; but not where a window's ring goes round, and states begin, or have to know lengths."""
    folder = model_folder(model_type)
    adapters = sources(load(folder), tmp_path)
    expected = answers_to_prompts(load(folder), adapters)
    monkeypatch.setattr(prompt_kernel, "launch", lambda: separately)
    monkeypatch.setattr(prompt_kernel, "applies", lambda queries, *_: queries.shape[2] > FEW)
    graphs.shapes.clear()
    assert answers_to_prompts(load(folder), adapters) == expected
    assert [graphs.shapes[shape] for shape in ((2, 32), (1, 64), (1, 32))] == [pairs, chunks, ends]


@pytest.mark.usefixtures("keeping")
def test_short_prompts_leave_nothing_that_another_graph_would_be_for(model_folder: ModelFolder, graphs: Graphs) -> None:
    """Those of up to 16 tokens are launches themselves, together or as a long one's last chunk."""
    driver = Driver(load(model_folder("llama")), prefill_step_size=16)
    for i, length in enumerate((8, 9, 10, 11, 24, 25)):
        driver.one(prompt=TEXT[:length], max_tokens=8, temperature=1.0, seed=i)
    assert graphs.kept == graphs.traced == 1


@pytest.mark.usefixtures("keeping")
def test_all_proposals_of_a_round_are_one_graph(
    model_folder: ModelFolder, graphs: Graphs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder("llama")
    target = load(folder, slack=SLACK)
    speculation = speculating(target, draft_folder(folder, tmp_path / "draft", "self"), always(3))
    driver = Driver(target, speculation=speculation, num_draft_tokens=3)
    graphs.kept = graphs.traced = 0  # of the calls that were timed at loading
    for i in range(2):
        driver.engine.submit(generate(i, prompt=TEXT[: 9 + i], max_tokens=200, temperature=0.5 * i, seed=4))
    for _ in range(8):
        driver.engine.step()
    before, drafted = graphs.calls, driver.engine.stats().drafted_tokens_total
    for _ in range(20):
        driver.engine.step()
    assert driver.engine.stats().drafted_tokens_total - drafted == 20 * 3 * 2
    assert graphs.calls - before == 20 * 2
    assert graphs.traced == graphs.kept == 2
    assert "built each time" not in caplog.text


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "seeded": [{"temperature": 0.8, "seed": 7}, {"temperature": 1.6, "seed": 8}, {}],
    "filtered": [
        {"temperature": 1.1, "top_p": 0.8, "min_p": 0.05, "top_k": 12, "seed": 3},
        {"temperature": 1.5, "top_p": 0.95, "min_p": 0.01, "top_k": 40, "seed": 4},
        {},
    ],
    # Drawn without a seed from what one token is left of.
    "unseeded": [{"temperature": 1.0, "top_k": 1}, {"temperature": 0.7, "seed": 9}, {}],
    "penalised": [{"repetition_penalty": 1.4, "logit_bias": {40: 3.0}}, {"presence_penalty": 0.5}, {}],
}


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize(
    "name",
    ["seeded", "penalised", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("filtered", "unseeded"))],
)
def test_a_graph_of_proposals_knows_no_other_settings_than_those_it_is_given(
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Graphs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Batches of one form, after each other: graphs are kept, and rows say what their own settings make them say."""
    folder = model_folder("llama")
    draft = draft_folder(folder, tmp_path / "draft", "perturbed")

    def said() -> tuple[list[str], float]:
        target = load(folder, slack=SLACK)
        driver = Driver(target, speculation=speculating(target, draft, always(3)), num_draft_tokens=3)
        settings, texts = SETTINGS[name], []
        for turn, order in enumerate(((0, 1), (1, 0), (0, 0), (1, 2), (2, 1))):
            requests = [
                generate(2 * turn + i, prompt=TEXT[: 9 + i], max_tokens=40, **settings[n]) for i, n in enumerate(order)
            ]
            texts += [answer.text for _, answer in sorted(driver.run(requests).items())]
        stats = driver.engine.stats()
        return texts, stats.accepted_tokens_total / stats.drafted_tokens_total

    found = said()
    assert graphs.calls > 40
    assert "built each time" not in caplog.text
    monkeypatch.setattr(attention_kernel, "launch", lambda: None)
    expected = said()
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=0.02), "and the draft proposes the same"


@pytest.mark.usefixtures("keeping")
def test_building_is_told_apart_from_calls_whose_graph_is_kept(model_folder: ModelFolder, graphs: Graphs) -> None:
    loaded = load(model_folder("llama"))
    call, caches = traced.TracedCalls(loaded.model), loaded.layout.new(2)
    caches.call(loaded.model, mx.array([[1], [2]]))
    spent = [0.0]
    for _ in range(8):
        mx.eval(call(caches, mx.array([[1], [2]])))
        caches.dispatched()
        spent.append(call.building)
    # Built anew twice, kept by the third; then only used.
    assert spent[0] < spent[1] < spent[2] < spent[3]
    assert spent[3:] == [spent[3]] * 6
    graphs.failing = True
    mx.eval(call(caches, mx.array([[1, 1], [2, 2]])))
    first = call.building
    for _ in range(4):
        mx.eval(call(caches, mx.array([[1, 1], [2, 2]])))
        caches.dispatched()
    failed = call.building
    assert failed > first > spent[-1]
    mx.eval(call(caches, mx.array([[1, 1], [2, 2]])))
    assert call.building == failed, "what is built each time is what a step costs"


def test_a_graph_knows_no_other_starts_than_those_it_is_given() -> None:
    """What the call before has made of them would be a constant of the graph."""
    positions = Positions(2)
    positions.restart([3, 5], [3, 5])
    positions.begin(1, None)
    made = mx.array([4, 6], dtype=mx.int32)
    positions.end(made)
    positions.begin(1, None)
    given = mx.array([7, 8], dtype=mx.int32)
    with positions.traced(given, 2):
        assert positions.row_starts is given
        assert positions.starts is given
        assert to_list(positions.offset) == [7, 8]
        assert positions.count == 2
    assert positions.count == 1
    assert positions.row_starts is made


def test_what_cannot_be_kept_is_built_each_time(
    model_folder: ModelFolder, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    """With nothing written twice, nor lost."""
    expected = answers(load(model_folder("llama")), None, [])
    graphs.failing, graphs.calls, graphs.kept = True, 0, 0
    assert answers(load(model_folder("llama")), None, []) == expected
    assert 0 < graphs.calls == graphs.kept
    assert "a step's graph is built each time" in caplog.text


def test_a_layer_that_attends_otherwise_is_no_graph(model_folder: ModelFolder, graphs: Graphs) -> None:
    loaded = load(model_folder("llama"))
    expected = answers(loaded, None, [])

    # Long contexts of few rows are not left to a launch.
    assert loaded.layout.launch is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.engine.kv.attention_kernel.applies", lambda *_: False)
        graphs.calls = graphs.kept = 0
        assert answers(loaded, None, []) == expected
    assert 0 < graphs.calls == graphs.kept


def test_few_graphs_are_kept(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, graphs: Graphs) -> None:
    expected = answers(load(model_folder("llama")), None, [])
    many = graphs.kept
    monkeypatch.setattr(traced, "_MOST", 1)
    monkeypatch.setattr(traced, "_MOST_COUNTED", 2)
    graphs.kept = 0
    assert answers(load(model_folder("llama")), None, []) == expected
    assert many > 2
