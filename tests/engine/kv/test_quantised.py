"""Packed keys and values: what they hold, what they weigh, and that a row's do not depend on the batch or on chunks."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv import quantised
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.quantised import Quantisation, attend
from runner.engine.loader import LoadedModel, load
from runner.errors import EngineLoadError
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver

FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2"]
FORMATS = [Quantisation(8, 64), Quantisation(8, 32), Quantisation(4, 64), Quantisation(4, 32)]
PROMPT = [(7 * i) % 300 for i in range(70)]


def ids(quantisation: Quantisation) -> str:
    return f"{quantisation.bits} bits, groups of {quantisation.group_size}"


@pytest.fixture(scope="module")
def llama(model_folder: ModelFolder) -> LoadedModel:
    return load(model_folder("llama", wide=True), quantisation=Quantisation(8, 64))


def prefilled(model: LoadedModel, rows: list[list[int]], chunk: int = 512) -> tuple[Caches, mx.array]:
    """Caches of rows, and the last logits of each [rows, vocabulary]."""
    caches = model.layout.new(len(rows))
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    answers = []
    for start in range(0, width, chunk):
        lengths = [min(max(len(row) - start, 0), chunk, width - start) for row in rows]
        answers.append(caches.call(model.model, mx.array([row[start : start + chunk] for row in padded]), lengths))
    logits = mx.concatenate(answers, axis=1)
    return caches, mx.stack([logits[i, len(row) - 1] for i, row in enumerate(rows)])


@pytest.mark.parametrize("tokens", [1, 3, 40], ids=["one token", "a few", "many"])
@pytest.mark.parametrize("quantisation", FORMATS, ids=ids)
def test_attention_is_that_of_the_unpacked_values(quantisation: Quantisation, tokens: int) -> None:
    keys, values = (mx.random.normal((3, 2, 50, 64), key=mx.random.key(i)) for i in range(2))
    queries = mx.random.normal((3, 8, tokens, 64), key=mx.random.key(2))
    mask = mx.arange(50) <= mx.array([10, 30, 49])[:, None, None, None]
    mask = mx.broadcast_to(mask, (3, 1, tokens, 50))
    packed = [quantisation.pack(array) for array in (keys, values)]
    found = attend(queries, *packed, quantisation, 0.125, mask, None)
    full = [quantisation.unpack(array) for array in packed]
    expected = mx.fast.scaled_dot_product_attention(queries, *full, scale=0.125, mask=mask)
    assert mx.allclose(found, expected, atol=1e-5)
    sinks = mx.ones((8,))
    with_sinks = attend(queries, *packed, quantisation, 0.125, mask, sinks)
    expected = mx.fast.scaled_dot_product_attention(queries, *full, scale=0.125, mask=mask, sinks=sinks)
    assert mx.allclose(with_sinks, expected, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_a_batch_are_what_they_are_alone(model_folder: ModelFolder, kind: str) -> None:
    model = load(model_folder(kind, wide=True), quantisation=Quantisation(4, 32))
    rows = [PROMPT[:5], PROMPT[3:63], PROMPT[2:30]]
    caches, together = prefilled(model, rows)
    alone = [prefilled(model, [row]) for row in rows]
    assert mx.allclose(together, mx.concatenate([logits for _, logits in alone]), atol=1e-3)
    for step in range(4):
        tokens = [[9 + step], [8], [7 * step]]
        together = caches.call(model.model, mx.array(tokens))[:, -1]
        each = [row.call(model.model, mx.array([new]))[:, -1] for (row, _), new in zip(alone, tokens, strict=True)]
        assert mx.allclose(together, mx.concatenate(each), atol=1e-3)


@pytest.mark.parametrize("chunk", [7, 16, 33])
def test_chunks_make_no_difference(llama: LoadedModel, chunk: int) -> None:
    """Not even whether the packed arrays are unpacked for them (wide ones are) or multiplied as they are."""
    whole = prefilled(llama, [PROMPT])[1]
    assert mx.allclose(whole, prefilled(llama, [PROMPT], chunk)[1], atol=1e-3)


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT[:5], PROMPT[3:63]]], ids=["one row", "rows of other lengths"])
def test_on_cuda_nothing_is_multiplied_as_it_is_packed(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]
) -> None:
    """MLX compiles such products for a minute there."""

    def answers() -> mx.array:
        caches, last = prefilled(llama, rows)
        calls = [[[9]] * len(rows), [[7, 8, 9]] * len(rows)]
        return mx.concatenate([last, *(caches.call(llama.model, mx.array(call))[:, -1] for call in calls)])

    def compiling(*_: object, **__: object) -> mx.array:
        raise AssertionError("compiled for a minute")

    expected = answers()
    monkeypatch.setattr(quantised, "_ON_CUDA", True)
    monkeypatch.setattr(mx, "quantized_matmul", compiling)
    assert mx.allclose(answers(), expected, atol=1e-3)


def test_rows_are_cut_without_copies(llama: LoadedModel) -> None:
    caches, _ = prefilled(llama, [PROMPT[:20], PROMPT[5:37]])
    caches.mark()
    caches.call(llama.model, mx.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    caches.keep(mx.array([1, 3], dtype=mx.int32))
    after = caches.call(llama.model, mx.array([[9], [9]]))[:, -1]
    caches.settle([3, 1])
    expected = [[*PROMPT[:20], 1, 9], [*PROMPT[5:37], 5, 6, 7, 9]]
    assert mx.allclose(after, mx.concatenate([prefilled(llama, [row])[1] for row in expected]), atol=1e-3)
    kept = llama.layout.restore([Beginning(30, (caches.piece(1, 0, 30),)), None])
    tokens = mx.array([PROMPT[35:37], PROMPT[:2]])
    again = kept.call(llama.model, tokens)[:, -1]
    assert mx.allclose(again[:1], prefilled(llama, [PROMPT[5:37]])[1], atol=1e-3)
    assert mx.allclose(again[1:], prefilled(llama, [PROMPT[:2]])[1], atol=1e-3)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.57), (4, 0.32)])
def test_weighs_what_its_bits_say(model_folder: ModelFolder, bits: int, most: float) -> None:
    """Of 16 bit; the tests' models compute in 32, in which the scales are too."""
    folder = model_folder("llama", wide=True)
    plain = prefilled(load(folder), [PROMPT])[0].nbytes
    packed = prefilled(load(folder, quantisation=Quantisation(bits, 64)), [PROMPT])[0].nbytes
    scales = 2 * 4 / 64
    assert packed / plain == pytest.approx((bits / 8 + scales) / 4)
    assert (bits / 8 + scales / 2) / 2 < most


def test_a_step_writes_in_place(llama: LoadedModel) -> None:
    caches, _ = prefilled(llama, [PROMPT, PROMPT[:9], PROMPT[:40], PROMPT[:50]])
    tokens = mx.array([[5]] * 4)
    mx.eval(caches.call(llama.model, tokens))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(4):
        mx.eval(caches.call(llama.model, tokens))
    assert mx.get_peak_memory() - before < caches.nbytes / 4


def test_eight_bits_say_what_sixteen_do(model_folder: ModelFolder) -> None:
    folder = model_folder("llama", wide=True)
    texts = [
        Driver(load(folder, quantisation=quantisation)).one(prompt=PROMPT, max_tokens=12).text
        for quantisation in (None, Quantisation(8, 32))
    ]
    assert texts[0] == texts[1]


def test_heads_that_groups_do_not_fit_are_refused_with_the_reason(model_folder: ModelFolder) -> None:
    with pytest.raises(
        EngineLoadError, match=r"kv_cache\.bits: .*divisible by the quantization group size 64"
    ) as error:
        load(model_folder("llama"), quantisation=Quantisation(8, 64))
    assert error.value.hint is not None
    assert "group_size" in error.value.hint


@pytest.mark.parametrize(("kind", "kept"), [("gemma3_text", "2 of 4"), ("lfm2", "2 of 3")])
def test_layers_that_are_left_as_they_are_are_told(model_folder: ModelFolder, kind: str, kept: str) -> None:
    loaded = load(model_folder(kind, wide=True), quantisation=Quantisation(8, 64))
    assert loaded.notes == (f"kv_cache.bits: {kept} layers stay as they are: their size is bounded",)
