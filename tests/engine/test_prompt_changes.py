"""The product of prompts with each row's change: on the host, compiled for a GPU, and on one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from runner.engine import product_kernel, prompt_changes
from runner.engine.adapters import prompts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed
from runner.engine.product_shapes import Kernels, Shapes
from tests.engine.adapters.stacks import of_two_parts, weight_of
from tests.engine.cuda_compiler import compile_kernel
from tests.engine.prompt_changes_on_host import PromptChangesOnHost
from tests.engine.test_product_changes import expected
from tests.engine.test_product_kernel import DTYPES, WHAT, exact

Make = Callable[[int, int, mx.Dtype, str], Changed]

SLOTS = [2, 0, 3, 1, 4, 2]
TOKENS = (9, 40, 70)
"""Less than a block's, and several blocks, the last of which is not full."""


def changes(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Stack:
    """One slot has more ranks than a block."""
    most = (16, 12) if epilogue == "swiglu" else (11, 9)
    return of_two_parts(outputs, inputs, dtype, epilogue, most)


def check(make: Make, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, lengths: tuple[int, ...]) -> None:
    """Against float64."""
    changed = make(outputs, inputs, dtype, "plain" if epilogue == "add" else epilogue)
    stack, weight = changes(outputs, inputs, dtype, epilogue), weight_of(outputs, inputs, dtype, epilogue)
    close = 4e-2 if dtype == mx.bfloat16 else 6e-3
    for tokens in lengths:
        shape = (len(SLOTS), tokens)
        x, added = (mx.random.normal((*shape, of), key=mx.random.key(of)).astype(dtype) for of in (inputs, outputs))
        found = changed(x, weight, added if epilogue == "add" else None, stack, RowSlots.of(SLOTS))
        assert found.shape == (*shape, outputs)
        np.testing.assert_allclose(
            exact(found), expected(x, weight, added, stack, SLOTS, epilogue), rtol=close, atol=close
        )


@pytest.fixture(scope="module", params=[2, 100], ids=["few blocks", "many blocks"])
def on_host(request: pytest.FixtureRequest) -> PromptChangesOnHost:
    return PromptChangesOnHost(request.param)


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "epilogue", "tokens"),
    [
        (64, 192, mx.bfloat16, "plain", 40),
        (128, 320, mx.float16, "add", 9),
        (96, 128, mx.bfloat16, "swiglu", 70),
    ],
    ids=str,
)
def test_on_the_host(
    on_host: PromptChangesOnHost, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, tokens: int
) -> None:
    check(on_host.changed, outputs, inputs, dtype, epilogue, (tokens,))


def test_a_tokens_inner_products_are_the_same_beside_others(on_host: PromptChangesOnHost) -> None:
    """To the bit; and those of a row without a change are not written."""
    dtype, inputs = mx.bfloat16, 192
    stack, weight = changes(64, inputs, dtype, "plain"), weight_of(64, inputs, dtype, "plain")
    x = mx.random.normal((len(SLOTS), 40, inputs), key=mx.random.key(1)).astype(dtype)
    whole = np.array(on_host.inner(x, weight, stack, RowSlots.of(SLOTS))).reshape(len(SLOTS), 40, -1)
    for row, slot in enumerate(SLOTS):
        if slot == 0:
            assert np.isnan(whole[row]).all()
            continue
        for tokens in (3, 33, 40):
            alone = on_host.inner(x[row : row + 1, :tokens], weight, stack, RowSlots.of([slot]))
            assert np.array_equal(np.array(alone), whole[row, :tokens])


@pytest.mark.parametrize("epilogue", ["plain", "swiglu"])
def test_only_prompts_take_it(on_host: PromptChangesOnHost, epilogue: str) -> None:
    """Where it is right: the shapes of a layer try it first."""
    outputs, inputs, dtype = 64, 128, mx.bfloat16
    stack, weight = changes(outputs, inputs, dtype, epilogue), weight_of(outputs, inputs, dtype, epilogue)

    def few(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> product_kernel.Multiply:
        gate = lambda y: y if epilogue == "plain" else on_the_host(y)  # noqa: E731
        return lambda x, w, added=None: gate(x @ w.T) if added is None else added + gate(x @ w.T)

    def wrong(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Changed:
        right = on_host.changed(outputs, inputs, dtype, epilogue)
        return lambda *given: 1.1 * right(*given)

    for make, taken in ((on_host.changed, True), (wrong, False)):
        shapes = Shapes(Kernels(few, prompts_changed=(make, prompt_changes.fits)))
        shape = shapes.plain(weight) if epilogue == "plain" else shapes.gated(weight)
        assert shape is not None
        x = mx.zeros((2, 40, inputs), dtype)
        assert shape.changed(x, stack) is None, "not tried yet"
        shape.prepare(weight, stack)
        assert (shape.changed(x, stack) is not None) == taken
        assert shape.changed(mx.zeros((80, 1, inputs), dtype), stack) is None, "rows that decode"
        assert shape.changed(mx.zeros((80, inputs), dtype), stack) is None, "rows and tokens are one axis"
        assert shape.changed(mx.zeros((2, 40, inputs), mx.float16), stack) is None
        normed = Stack(stack.down, stack.b, mx.ones(stack.b.shape[::2]), stack.spans)
        assert shape.changed(x, normed) is None, "DoRA"


def on_the_host(y: mx.array) -> mx.array:
    """An MLP's gate."""
    gate, up = mx.split(y, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [None, "plain", "swiglu"])
def test_compiles_for_the_device(dtype: mx.Dtype, epilogue: str | None) -> None:
    for warps in {prompts.WARPS, prompts.warps_of(8192) if epilogue is None else prompts.WARPS}:
        header, source = prompts.header(dtype, epilogue, warps), prompts.source(epilogue)
        outputs = {"out": mx.float32 if epilogue is None else dtype}
        needs = compile_kernel(header, source, prompts.inputs_of(epilogue, dtype), outputs)
        assert needs.local == 0, "nothing has to be put aside"
        assert needs.registers <= 128, "a multiprocessor has two blocks at once, of eight warps"


@pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", WHAT)
@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (2048, 8192), (8192, 1088), (3072, 2048)])
def test_on_the_device(outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> None:
    check(prompt_changes.changed, outputs, inputs, dtype, epilogue, TOKENS)
