"""`prompt_changes` on the host: the inner products of prompts' tokens, and the launch that follows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from runner.engine.adapters import inner_kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.product_on_host import arguments_of, board_of, launch, on_host
from tests.engine.tensor_cores_on_host import DEVICE, TYPES
from tests.engine.wide_changes_on_host import WideChangesOnHost

WARPS = 2
"""Of a block here; a device's has more."""


class PromptChangesOnHost:
    """Makes products as `prompt_changes.changed` does. Each is computed at once."""

    def __init__(self) -> None:
        self._wide = WideChangesOnHost()
        self._built: dict[mx.Dtype, Run] = {}

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Changed:
        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            y = x.astype(mx.float32) @ weight.astype(mx.float32).T
            inner = self.inner(x, weight, stack, slots)
            return self._wide.expand(y.astype(dtype), inner, stack, slots, added, epilogue)

        return call

    def inner(self, x: mx.array, weight: mx.array, stack: Stack, slots: RowSlots) -> mx.array:
        """As `inner_kernel.inner`; what it leaves unwritten is no number."""
        assert stack.packed is not None
        (rows, tokens, _), (count, ranks, _) = x.shape, stack.down.shape
        result = np.full((1, rows * tokens, count, ranks), np.nan, dtype=np.float32)
        blocks = rows * -(-tokens // 32) * -(-ranks // 16)
        views = [on_host(array) for array in (x, weight, stack.packed, board_of(slots))]
        launch(self._run(x.dtype), blocks, WARPS * 32, views, result)
        return mx.array(result)

    def _run(self, dtype: mx.Dtype) -> Run:
        if dtype not in self._built:
            header = TYPES + inner_kernel.constants(dtype, WARPS) + DEVICE
            arguments = arguments_of([*inner_kernel.inputs_of(dtype)], "T") | {"out": "float*"}
            self._built[dtype] = compiled(header, inner_kernel.source(), arguments, "")
        return self._built[dtype]
