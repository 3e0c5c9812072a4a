"""`prompt_changes` on the host: the inner products of prompts' tokens, and the launch that adds the changes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from runner.engine.adapters import prompts
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed
from runner.engine.product_source import SWIGLU
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.product_on_host import arguments_of, board_of, launch, on_host
from tests.engine.tensor_cores_on_host import DEVICE, TYPES

WARPS = 2
"""Of a block here; a device's has more."""


class PromptChangesOnHost:
    """Makes products as `prompt_changes.changed` does. Each is computed at once."""

    def __init__(self, blocks: int) -> None:
        """So many would run at once."""
        self._blocks = blocks
        self._built: dict[tuple[mx.Dtype, str | None], Run] = {}

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str) -> Changed:
        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            y = x.astype(mx.float32) @ weight.astype(mx.float32).T
            return self.add(y.astype(dtype), self.inner(x, weight, stack, slots), stack, slots, added, epilogue)

        return call

    def inner(self, x: mx.array, weight: mx.array, stack: Stack, slots: RowSlots) -> mx.array:
        """As `prompts.inner`; what it leaves unwritten is no number."""
        assert stack.packed is not None
        (rows, tokens, _), ranks = x.shape, stack.down.shape[1]
        result = np.full((rows * tokens, ranks), np.nan, dtype=np.float32)
        blocks = rows * -(-tokens // 16) * -(-ranks // 16)
        views = [on_host(array) for array in (x, weight, stack.packed, board_of(slots))]
        launch(self._run(x.dtype, None), blocks, WARPS * 32, views, result)
        return mx.array(result)

    def add(
        self, y: mx.array, inner: mx.array, stack: Stack, slots: RowSlots, added: mx.array | None, epilogue: str
    ) -> mx.array:
        """As `prompts.add`."""
        assert stack.packed is not None
        rows, tokens, outputs = y.shape
        outputs //= parts(epilogue)
        rest = [] if epilogue == "swiglu" else [mx.zeros((1,), y.dtype) if added is None else added]
        views = [on_host(array) for array in (y, inner, *rest, stack.packed, board_of(slots))]
        result = np.zeros((rows, tokens, outputs), dtype=np.uint16)
        blocks = prompts.adding_blocks(rows, tokens, outputs, WARPS, self._blocks)
        launch(self._run(y.dtype, epilogue), blocks, WARPS * 32, views, result)
        return mx.array(result).view(y.dtype)

    def _run(self, dtype: mx.Dtype, epilogue: str | None) -> Run:
        if (dtype, epilogue) not in self._built:
            header = TYPES + prompts.constants(dtype, epilogue, WARPS, self._blocks) + DEVICE
            header += SWIGLU if epilogue == "swiglu" else ""
            arguments = arguments_of([*prompts.inputs_of(epilogue, dtype)], "T")
            if epilogue is None:
                arguments["out"] = "float*"
            self._built[dtype, epilogue] = compiled(header, prompts.source(epilogue), arguments, "")
        return self._built[dtype, epilogue]
