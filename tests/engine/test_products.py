"""A model whose products of few tokens are made by a kernel says what it said."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from runner.engine import products, traced, wide_changes, wide_product_kernel
from runner.engine.adapters import mixed
from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.joined import join_siblings
from runner.engine.kv.layout import Layout
from runner.engine.product_kernel import MOST_ROWS, Changed, Multiply, Way
from runner.engine.product_shapes import Kernels, MakeChanged
from runner.engine.weights import narrow_model
from runner.engine.wide_changed_kernel import Fits
from runner.protocol import AdapterSource
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.kv.launches import separately
from tests.engine.operations import operations
from tests.engine.product_on_host import OnHost

PROMPT = mx.array([[7, 3, 11], [4, 4, 8]])
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Spelled:
    """Makes products of MLX's operations, and counts them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Multiply:
        def call(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
            assert x.dtype == weight.dtype == dtype
            assert weight.shape == (outputs * (2 if epilogue == "swiglu" else 1), inputs)
            self.calls[epilogue if added is None else "sum"] += 1
            return _followed(x @ weight.T, added, epilogue)

        return call

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Changed:
        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, rows: RowSlots) -> mx.array:
            assert x.dtype == weight.dtype == dtype
            assert stack.b.shape[2] == weight.shape[0] == outputs * (2 if epilogue == "swiglu" else 1)
            self.calls["changed " + (epilogue if added is None else "sum")] += 1
            return _followed(_with_changes(x, x @ weight.T, stack, rows), added, epilogue)

        return call

    def add_changes(
        self, x: mx.array, y: mx.array, stack: Stack, rows: RowSlots, added: mx.array | None, epilogue: str
    ) -> mx.array:
        self.calls["then changed " + (epilogue if added is None else "sum")] += 1
        return _followed(_with_changes(x, y, stack, rows), added, epilogue)

    def gate(self, y: mx.array) -> mx.array:
        self.calls["then gate"] += 1
        return _followed(y, None, "swiglu")


def _with_changes(x: mx.array, y: mx.array, stack: Stack, rows: RowSlots) -> mx.array:
    if rows.only is None:
        change = mx.gather_mm(x, stack.a, rhs_indices=rows.slots)
        return y + mx.gather_mm(change, stack.b, rhs_indices=rows.slots)
    a, b, _ = stack.slot(rows.only)
    return mx.addmm(y, x @ a, b)


def _followed(y: mx.array, added: mx.array | None, epilogue: str) -> mx.array:
    if added is not None:
        return added + y
    return swiglu(*mx.split(y, 2, axis=-1)) if epilogue == "swiglu" else y


@pytest.fixture
def gathers_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's CPU has this product in float32 only."""
    gather = mx.gather_mm

    def wider(x: mx.array, weights: mx.array, **indices: mx.array) -> mx.array:
        found = gather(x.astype(mx.float32), weights.astype(mx.float32), **indices)
        return found.astype(x.dtype)

    monkeypatch.setattr(mx, "gather_mm", wider)


def joined(folder: Path, dtype: mx.Dtype = mx.bfloat16, **config: Any) -> Any:
    """A model as the loader has it before its products are made."""
    model = narrow_model(folder, json.loads((folder / "config.json").read_text()) | config)
    model.set_dtype(dtype)
    join_siblings(model, lambda: model(PROMPT))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    ("model_type", "plain", "gated", "sums"),
    # Of each usual block: projections; an MLP's gate and input at once; attention's and the MLP's output with sums.
    [("llama", 3, 3, 6), ("qwen3", 2, 2, 4), ("gemma3_text", 16, 0, 0)],
)
def test_a_call_of_few_tokens_is_made_of_such_products(
    model_folder: ModelFolder, model_type: str, plain: int, gated: int, sums: int
) -> None:
    model = joined(model_folder(model_type))
    expected, paths = model(PROMPT), [path for path, _ in model.named_modules()]
    weights = [path for path, _ in tree_flatten(model.parameters())]
    spelled = Spelled()

    assert products.install(model, Kernels(spelled)) == plain + gated + sums
    spelled.calls.clear()

    assert mx.array_equal(model(PROMPT), expected)
    assert spelled.calls == Counter({k: n for k, n in (("plain", plain), ("swiglu", gated), ("sum", sums)) if n})
    assert [path for path, _ in model.named_modules()] == paths
    assert [path for path, _ in tree_flatten(model.parameters())] == weights
    assert isinstance(model.layers[0].self_attn.o_proj, nn.Linear)


MANY = mx.arange(MOST_ROWS + 1).reshape(-1, 1)


def test_more_tokens_than_there_are_kernels_for_are_mlx_s(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spelled = joined(model_folder("llama")), Spelled()
    expected = model(MANY)
    products.install(model, Kernels(spelled))
    spelled.calls.clear()
    model(mx.ones((2, 16), dtype=mx.int32))
    assert spelled.calls.total() == 12
    spelled.calls.clear()
    sums = counted(monkeypatch, "addmm")
    found = model(MANY)
    assert spelled.calls.total() == 0
    assert sums == ["addmm"] * 6, "residual sums are part of MLX's products"
    assert close(found, expected)


def test_the_gate_of_more_tokens_is_a_launch(model_folder: ModelFolder) -> None:
    model, spelled = joined(model_folder("llama")), Spelled()
    expected = model(MANY)
    products.install(model, Kernels(spelled, gate=spelled.gate))
    spelled.calls.clear()
    assert close(model(MANY), expected)
    assert spelled.calls == Counter({"then gate": 3})


@pytest.mark.parametrize("rows", [17, MOST_ROWS + 1, wide_product_kernel.MOST_ROWS])
def test_up_to_128_tokens_have_kernels_of_their_own(model_folder: ModelFolder, rows: int) -> None:
    model, few, many = joined(model_folder("llama")), Spelled(), Spelled()
    tokens = mx.arange(rows).reshape(-1, 1) % 64
    expected = model(tokens)
    products.install(model, Kernels(few, gate=few.gate, wide=many))
    few.calls.clear()
    many.calls.clear()
    assert mx.array_equal(model(tokens), expected)
    assert many.calls == Counter({"plain": 3, "swiglu": 3, "sum": 6})
    many.calls.clear()
    model(PROMPT)
    model(mx.ones((1, wide_product_kernel.MOST_ROWS + 1), dtype=mx.int32))
    assert many.calls == Counter({"swiglu": 3}), "gates are faster so for few tokens, too"
    assert few.calls == Counter({"plain": 3, "sum": 6, "then gate": 3})


def test_weights_that_no_wide_kernel_fits_have_one_for_few_tokens() -> None:
    single, few, many = nn.Sequential(nn.Linear(64, 48, bias=False)), Spelled(), Spelled()
    single.set_dtype(mx.bfloat16)
    assert products.install(single, Kernels(few, wide=many)) == 1
    assert many.calls.total() == 0


def test_a_wide_kernel_that_fails_its_trial_leaves_the_other(model_folder: ModelFolder) -> None:
    model, few = joined(model_folder("llama")), Spelled()
    expected = model(MANY)

    def make(*_: Any) -> Multiply:
        return lambda x, weight: (x @ weight.T) * 1.05

    assert products.install(model, Kernels(few, wide=make)) == 12
    few.calls.clear()
    model(PROMPT)
    assert few.calls.total() == 12
    assert close(model(MANY), expected)


@pytest.mark.usefixtures("gathers_16_bit")
@pytest.mark.parametrize("fits", [True, False])
def test_rows_of_any_one_adapter_share_a_graph_where_all_is_in_kernels(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Any, fits: bool
) -> None:
    model, spelled, kept = joined(model_folder("llama")), Spelled(), []
    ours = ((lambda *what: spelled.changed(*what), lambda *_: True),)
    prompts = (lambda *what: spelled.changed(*what), lambda *_: fits)
    products.install(
        model, Kernels(spelled, gate=spelled.gate, wide=spelled, wide_changed=ours, prompts_changed=prompts)
    )
    bank, shapes = AdapterBank(model, mx.bfloat16), linear_shapes(llama, (*ATTENTION, *MLP))
    assert bank.alike, "nothing is changed"
    for seed, name in enumerate("ab"):
        folder = write_mlx(tmp_path / name, draw(shapes, 4, seed), keys=(*ATTENTION, *MLP))
        bank.load(AdapterSource(name, str(folder)))
    assert bank.alike == fits
    monkeypatch.setattr(traced, "compiled", lambda function: kept.append(function) or function)
    caches, call = Layout(model, launch=separately).new(2), traced.TracedCalls(model, bank)
    caches.reserve(64)
    caches.call(model, PROMPT)
    said = []
    for name in "ababababab":
        slots = bank.slots([bank.acquire(name)] * 2)
        said.append(call(caches, mx.array([[5], [6]]), slots))
        mx.eval(said[-1], caches.arrays)
        caches.dispatched()
    assert len(kept) == (1 if fits else 2)
    assert not mx.allclose(said[-1], said[-2])


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """An operation's name for each call of it that is still to come."""
    calls, function = [], getattr(mx, name)

    def counts(*arguments: Any) -> mx.array:
        calls.append(name)
        result: mx.array = function(*arguments)
        return result

    monkeypatch.setattr(mx, name, counts)
    return calls


def close(found: mx.array, expected: mx.array) -> bool:
    """But for roundings."""
    apart = mx.linalg.norm((found - expected).astype(mx.float32))
    return bool((apart < 0.03 * mx.linalg.norm(expected.astype(mx.float32))).item())


def test_a_tied_embedding_is_multiplied_with_as_well() -> None:
    model, spelled = nn.Module(), Spelled()
    model.embed_tokens = nn.Embedding(48, 64)
    model.set_dtype(mx.float16)
    x = mx.random.normal((2, 1, 64)).astype(mx.float16)
    expected = model.embed_tokens.as_linear(x)
    assert products.install(model, Kernels(spelled)) == 1
    spelled.calls.clear()
    assert mx.array_equal(model.embed_tokens.as_linear(x), expected)
    assert spelled.calls == Counter(plain=1)
    assert model.embed_tokens(mx.array([3])).shape == (1, 64)
    # Tokens of another type are not the kernel's.
    assert model.embed_tokens.as_linear(x.astype(mx.float32)).dtype == mx.float32
    assert spelled.calls == Counter(plain=1)


def test_what_no_kernel_takes_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64, bias=False), nn.Linear(64, 40, bias=False))
    model.set_dtype(mx.bfloat16)
    assert products.install(model, Kernels(Spelled())) == 0
    assert [type(layer) for layer in model.layers] == [nn.Linear] * 3
    single = nn.Sequential(nn.Linear(64, 64, bias=False))
    assert products.install(single, Kernels(Spelled())) == 0, "float32"


@pytest.mark.parametrize("how", ["wrong", "does not compile"])
def test_a_kernel_that_fails_its_trial_is_not_used(model_folder: ModelFolder, how: str) -> None:
    model = joined(model_folder("llama"))
    expected = model(PROMPT)

    def make(*_: Any) -> Multiply:
        def call(x: mx.array, weight: mx.array) -> mx.array:
            if how == "does not compile":
                raise RuntimeError("Failed to compile kernel")
            return (x @ weight.T) * 1.05

        return call

    assert products.install(model, Kernels(make)) == 0
    assert mx.array_equal(model(PROMPT), expected)


@pytest.mark.parametrize("adapted", [ATTENTION, MLP])
def test_adapters_change_what_they_did(
    model_folder: ModelFolder, tmp_path: Path, adapted: tuple[str, ...], llama: Any
) -> None:
    shapes = linear_shapes(llama, adapted)
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", draw(shapes, 4, 1), keys=adapted)))
    spelled, said = Spelled(), []
    for make in (None, spelled):
        model = joined(model_folder("llama"))
        if make is not None:
            products.install(model, Kernels(make))
        bank = AdapterBank(model, mx.bfloat16)
        bank.load(source)
        for rows in (None, bank.slots([bank.acquire("a")] * 2)):
            spelled.calls.clear()
            bank.apply(rows)
            said.append(model(PROMPT))
            if make is not None:
                fused = 0 if rows is not None and adapted == MLP else 3
                assert spelled.calls == Counter(plain=9 - 2 * fused, swiglu=fused, sum=3 + fused)
    assert mx.array_equal(said[2], said[0])
    assert mx.array_equal(said[3], said[1])
    assert not mx.allclose(said[1], said[0])


@pytest.mark.usefixtures("gathers_16_bit")
@pytest.mark.parametrize("adapted", [ATTENTION, MLP, ("self_attn.o_proj", "mlp.down_proj")], ids=str)
def test_changes_are_part_of_the_products(
    model_folder: ModelFolder, tmp_path: Path, adapted: tuple[str, ...], llama: Any
) -> None:
    """To the bit, for rows of one adapter, of several, and of none."""
    sources = [
        AdapterSource(key, str(write_mlx(tmp_path / key, draw(linear_shapes(llama, keys), rank, rank), keys=keys)))
        for key, rank, keys in (("a", 4, adapted), ("b", 2, adapted[:1]), ("c", 3, adapted[1:]))
    ]
    spelled, said = Spelled(), []
    for fused in (False, True):
        model = joined(model_folder("llama"))
        products.install(model, Kernels(spelled, spelled.changed if fused else None))
        bank = AdapterBank(model, mx.bfloat16)
        for source in sources:
            bank.load(source)
        said.append([])
        for keys in ((), ("a", "a"), ("b", "c"), ("", "a")):
            spelled.calls.clear()
            bank.apply(bank.slots([bank.acquire(key) for key in keys]))
            said[-1].append(model(PROMPT))
            if fused:
                changed = {key: n for key, n in spelled.calls.items() if key.startswith("changed")}
                # Of three blocks: joined projections, the two ends with sums, the gate with its input.
                sites = {"changed plain": 3 * (adapted == ATTENTION), "changed swiglu": 3 * (adapted == MLP)}
                sites["changed sum"] = 3 * sum(key.endswith(("o_proj", "down_proj")) for key in adapted)
                assert changed == ({key: n for key, n in sites.items() if n} if keys else {})
                assert spelled.calls.total() == 12, "no product is apart"
    assert all(mx.array_equal(one, other).item() for one, other in zip(*said, strict=True))
    assert not mx.allclose(said[0][0], said[0][1])


@pytest.mark.usefixtures("gathers_16_bit")
@pytest.mark.parametrize("adapted", [ATTENTION, MLP, (*ATTENTION, *MLP)], ids=["attention", "mlp", "all"])
@pytest.mark.parametrize("same", [True, False], ids=["one adapter", "several"])
@pytest.mark.parametrize("rows", [MOST_ROWS + 1])
def test_changes_of_more_tokens_are_a_launch_with_what_follows(
    model_folder: ModelFolder, tmp_path: Path, adapted: tuple[str, ...], llama: Any, same: bool, rows: int
) -> None:
    """To the bit what they are apart, where no sum is part of MLX's product then."""
    shapes = linear_shapes(llama, adapted)
    sources = [
        AdapterSource(key, str(write_mlx(tmp_path / key, draw(shapes, rank, rank), keys=adapted)))
        for key, rank in (("a", 4), ("b", 2))
    ]
    spelled, said = Spelled(), []
    for fused in (False, True):
        model = joined(model_folder("llama"))
        products.install(model, Kernels(spelled, spelled.changed, spelled.add_changes if fused else None))
        bank = AdapterBank(model, mx.bfloat16)
        for source in sources:
            bank.load(source)
        bank.apply(bank.slots([bank.acquire("a" if same or row % 2 else "b") for row in range(rows)]))
        spelled.calls.clear()
        said.append(model(MANY[:rows]))
    mlp, ends = 3 * ("mlp.up_proj" in adapted), 3 * sum(key.endswith(("o_proj", "down_proj")) for key in adapted)
    sites = {"plain": 3 * ("self_attn.q_proj" in adapted), "swiglu": mlp, "sum": ends}
    then = {key: count for key, count in spelled.calls.items() if key.startswith("then")}
    assert then == {f"then changed {key}": count for key, count in sites.items() if count}
    assert spelled.calls.total() - sum(then.values()) == (12 if rows <= MOST_ROWS else 0), "products are the kernel's"
    assert close(*said) if ends else mx.array_equal(*said).item()


@pytest.mark.usefixtures("gathers_16_bit")
@pytest.mark.parametrize(("rank", "fits"), [(2, True), (24, False)])
@pytest.mark.parametrize("ways", ["right", "broken", "broken, right", "unfit, right"])
def test_up_to_128_tokens_have_changes_within_their_products(
    model_folder: ModelFolder, tmp_path: Path, llama: Any, rank: int, fits: bool, ways: str
) -> None:
    """Those that fit, of kernels that are right; to the bit what they are apart."""
    keys = (*ATTENTION, "self_attn.o_proj", *MLP)
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", draw(linear_shapes(llama, keys), rank, 1), keys=keys)))
    few, many, said = Spelled(), Spelled(), []
    rows = wide_product_kernel.MOST_ROWS

    def wrong(*what: Any) -> Changed:
        changed = many.changed(*what)
        return lambda *call: changed(*call) * 1.05

    right: tuple[MakeChanged, Fits] = (many.changed, wide_changes.fits)
    of = {"right": right, "broken": (wrong, wide_changes.fits), "unfit": (wrong, lambda *_: False)}
    for makes in ((), tuple(of[way] for way in ways.split(", "))):
        model = joined(model_folder("llama"))
        products.install(model, Kernels(few, few.changed, few.add_changes, few.gate, many, makes))
        bank = AdapterBank(model, mx.bfloat16)
        bank.load(source)
        bank.apply(bank.slots([bank.acquire("a") if row % 2 else None for row in range(rows)]))
        few.calls.clear()
        many.calls.clear()
        said.append(model(mx.arange(rows).reshape(-1, 1) % 64))
    apart = Counter({"then changed plain": 3, "then changed swiglu": 3, "then changed sum": 6})
    within = Counter({"changed plain": 3, "changed swiglu": 3, "changed sum": 6})
    taken = fits and ways.endswith("right")
    assert few.calls == (Counter() if taken else apart)
    assert many.calls == (within if taken else Counter({"plain": 12}))
    assert mx.array_equal(*said).item()


def test_changes_that_no_kernel_takes_are_made_apart(model_folder: ModelFolder, tmp_path: Path, llama: Any) -> None:
    """More tokens, and kernels that do not compile: the sums of those are then apart as well."""

    def broken(*_: Any) -> Changed:
        def call(*_: Any) -> mx.array:
            raise RuntimeError("Failed to compile kernel")

        return call

    keys = ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj")
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", draw(linear_shapes(llama, keys), 4, 1), keys=keys)))
    spelled = Spelled()
    for change, prompt in ((spelled.changed, mx.ones((3, 11), dtype=mx.int32)), (broken, PROMPT)):
        said = []
        for made in (None, change):
            model = joined(model_folder("llama"))
            if made is not None:
                products.install(model, Kernels(spelled, made))
            bank = AdapterBank(model, mx.bfloat16)
            bank.load(source)
            bank.apply(bank.slots([bank.acquire("a")] * len(prompt)))
            spelled.calls.clear()
            said.append(model(prompt))
        assert not any(key.startswith("changed") for key in spelled.calls)
        assert mx.array_equal(*said).item() if change is broken else close(*said)


@pytest.mark.usefixtures("gathers_16_bit")
@pytest.mark.parametrize("keys", [("a", "a", "a"), ("a", "", "b"), ("a", "dora", "")], ids=str)
def test_mlx_s_products_have_the_sums_of_prompts_with_changes(
    model_folder: ModelFolder, tmp_path: Path, llama: Any, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those of layers that DoRA changes, which scales the product and not what it is added to."""
    monkeypatch.setattr(mixed, "way", lambda *_: "together")
    adapted, said, sums = ("self_attn.o_proj", "mlp.down_proj"), [], []
    shapes, prompt = linear_shapes(llama, adapted), mx.arange(33).reshape(3, 11)
    magnitudes = {path: mx.full((outputs,), 1.5) for path, (_, outputs) in shapes.items()}
    for made in (False, True):
        model = joined(model_folder("llama"))
        if made:
            products.install(model, Kernels(Spelled()))
        bank = AdapterBank(model, mx.bfloat16)
        for seed, key in enumerate(sorted({*keys} - {""})):
            given = {"magnitudes": magnitudes} if key == "dora" else {}
            folder = write_mlx(tmp_path / key, draw(shapes, 4, seed), keys=adapted, **given)
            bank.load(AdapterSource(key, str(folder)))
        counts = []
        for rows in (None, bank.slots([bank.acquire(key) if key else None for key in keys])):
            bank.apply(rows)
            found = model(prompt)
            counts.append(operations(tmp_path, found))
        said.append(found)
        sums.append(counts[1]["Add"] - counts[0]["Add"])
    assert close(said[1], said[0])
    assert not close(said[1], model_without(bank, model, prompt))
    # Of three blocks with two ends each. Without kernels a sum is apart in any way.
    assert sums == [0, 6 if "dora" in keys else 0]


def model_without(bank: AdapterBank, model: Any, prompt: mx.array) -> mx.array:
    """What it says when no row has an adapter."""
    bank.apply(None)
    said: mx.array = model(prompt)
    return said


def test_off_without_a_device(model_folder: ModelFolder) -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    assert products.install(joined(model_folder("llama"))) == 0


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_model_through_the_kernel_itself(model_folder: ModelFolder) -> None:
    model = joined(model_folder("llama"))
    expected = model(PROMPT).astype(mx.float32)
    host = OnHost()
    count = products.install(model, Kernels(lambda *what: host.multiply(*what, lambda *_: Way(1, 2, 2))))
    assert count == 12
    found = model(PROMPT).astype(mx.float32)
    assert mx.linalg.norm(found - expected).item() < 0.03 * mx.linalg.norm(expected).item()
    assert not mx.array_equal(found, expected), "the sums' order is another"


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("gathers_16_bit")
def test_a_model_with_adapters_through_the_kernel_itself(model_folder: ModelFolder, tmp_path: Path, llama: Any) -> None:
    host, found = OnHost(), []
    shapes = linear_shapes(llama, (*ATTENTION, *MLP))
    source = AdapterSource("a", str(write_mlx(tmp_path / "a", draw(shapes, 4, 1), keys=(*ATTENTION, *MLP))))
    for make in (None, lambda *what: host.changed(*what, lambda *_: Way(1, 2, 2))):
        model = joined(model_folder("llama"))
        if make is not None:
            products.install(model, Kernels(lambda *what: host.multiply(*what, lambda *_: Way(1, 2, 2)), make))
        bank = AdapterBank(model, mx.bfloat16)
        bank.load(source)
        bank.apply(bank.slots([bank.acquire("a"), None]))
        found.append(model(PROMPT).astype(mx.float32))
    expected, through = found
    assert mx.linalg.norm(through - expected).item() < 0.03 * mx.linalg.norm(expected).item()
    assert not mx.array_equal(through, expected), "the sums' order is another"
