"""The CUDA kernel against plain products. Only where there is a CUDA device."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine import cuda_kernels
from runner.engine.adapters import kernel
from runner.engine.adapters.stack import Stack
from tests.engine.adapters.stacks import draw, joined

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.SWITCH, "1")
    cuda_kernels.usable.cache_clear()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("parts", [[(2048, 16)], [(2048, 8), (512, 8), (512, 8)], [(8192, 4), (8192, 0)], [(64, 3)]])
def test_equals_plain_products(parts: list[tuple[int, int]], tokens: int, dtype: mx.Dtype) -> None:
    inputs = 512
    stack = Stack.empty(1, joined(inputs, parts, 1, dtype))
    for seed in (1, 2, 3):
        stack = stack.appended(joined(inputs, [(out, r * seed // 2) for out, r in parts], 10 * seed, dtype))
    stack = stack.appended_nothing()
    slots = [0, 1, 2, 3, 4, 2]
    x, y = draw((6, tokens, inputs), 4, dtype) * 8, draw((6, tokens, stack.b.shape[-1]), 5, dtype)

    assert kernel.applies(x, stack)
    found = kernel.add_changes(x, y, stack, mx.array(slots, dtype=mx.int32))

    for row, slot in enumerate(slots):
        a, b, _ = stack.slot(slot)
        exact = y[row].astype(mx.float32) + (x[row].astype(mx.float32) @ a.astype(mx.float32)) @ b.astype(mx.float32)
        assert mx.allclose(found[row].astype(mx.float32), exact, rtol=2e-2, atol=2e-2), (row, slot)
