"""`wide_changes` on the host: the product with inner products, the launch that follows, and both as one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from runner.engine.adapters import expand
from runner.engine.adapters.expand import Way
from runner.engine.adapters.kernel import parts
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import Changed
from runner.engine.product_source import SWIGLU
from runner.engine.wide_product_kernel import Choose
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.product_on_host import arguments_of, board_of, launch, on_host
from tests.engine.tensor_cores_on_host import TYPES
from tests.engine.wide_product_on_host import WideOnHost

HOST_WAYS = {"plain": Way(32, 8), "swiglu": Way(32, 4)}
TILED = Way(64, 3, 32, 4)
"""Several blocks of rows, and of outputs."""


class WideChangesOnHost:
    """Makes products as `wide_changes.changed` does. Each is computed at once."""

    def __init__(self) -> None:
        self._wide = WideOnHost()
        self._built: dict[str, Run] = {}

    def changed(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Changed:
        multiply = self._wide.with_inner(outputs * parts(epilogue), inputs, dtype, choose)

        def call(x: mx.array, weight: mx.array, added: mx.array | None, stack: Stack, slots: RowSlots) -> mx.array:
            return self.expand(*multiply(x, weight, stack), stack, slots, added, epilogue)

        return call

    def at_once(self, outputs: int, inputs: int, dtype: mx.Dtype, epilogue: str, choose: Choose) -> Changed:
        """As `wide_changed_kernel.changed`."""
        return self._wide.changed(outputs, inputs, dtype, epilogue, choose)

    def expand(
        self,
        y: mx.array,
        inner: mx.array,
        stack: Stack,
        slots: RowSlots,
        added: mx.array | None,
        epilogue: str,
        way: Way | None = None,
    ) -> mx.array:
        """As `expand.expand`, by blocks of fewer threads."""
        way = way or HOST_WAYS[epilogue]
        assert stack.packed is not None
        outputs, dtype = y.shape[-1] // parts(epilogue), y.dtype
        arrays = {"y": y, "inner": inner, "changes": stack.packed, "board": board_of(slots)}
        arrays["added"] = mx.zeros((1,), dtype) if added is None else added
        names = [*expand.inputs_of(epilogue, dtype)]
        result = np.zeros((*y.shape[:-1], outputs), dtype=np.uint16)
        assert way.fits(stack, epilogue)
        blocks = way.grid(inner.shape[1], outputs)[0] // way.threads
        views = [on_host(arrays[name]) for name in names]
        launch(self._run(dtype, epilogue, way), blocks, way.threads, views, result)
        return mx.array(result).view(dtype)

    def _run(self, dtype: mx.Dtype, epilogue: str, way: Way) -> Run:
        key = f"{dtype}{epilogue}{way}"
        if key not in self._built:
            header = TYPES + expand.constants(dtype, epilogue, way) + "static uint4 room[6 * 1024];\n"
            header += SWIGLU if epilogue == "swiglu" else ""
            names = [*expand.inputs_of(epilogue, dtype)]
            self._built[key] = compiled(header, expand.source(epilogue, way), arguments_of(names, "T"), "")
        return self._built[key]
