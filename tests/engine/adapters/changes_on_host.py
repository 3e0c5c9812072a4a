"""The launches that follow a product of many tokens, on the host."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from runner.engine import product_kernel
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_source import GATE, SWIGLU
from tests.engine.cuda_on_host import Run, compiled
from tests.engine.product_on_host import arguments_of, board_of, launch, on_host
from tests.engine.tensor_cores_on_host import TYPES

THREADS, TILE = 64, 128


class ChangesOnHost:
    """`kernel.add_changes` by blocks of fewer threads, and `product_kernel.gate`."""

    def __init__(self) -> None:
        self._built: dict[str, Run] = {}

    def __call__(
        self, x: mx.array, y: mx.array, stack: Stack, rows: RowSlots, added: mx.array | None, epilogue: str
    ) -> mx.array:
        assert stack.packed is not None
        assert kernel.fits(x, stack)
        outputs = y.shape[-1] // kernel.parts(epilogue)
        arrays = {"x": x, "y": y, "changes": stack.packed, "board": board_of(rows)}
        arrays["added"] = mx.zeros((1,), x.dtype) if added is None else added
        names = kernel.inputs_of(epilogue)
        header = kernel.constants(x.dtype, epilogue, THREADS, TILE)
        run = self._run(header, kernel.source(epilogue), names, epilogue == "swiglu")
        result = np.zeros((*y.shape[:-1], outputs), dtype=np.uint16)
        blocks = y.shape[0] * y.shape[1] * -(-outputs // TILE)
        launch(run, blocks, THREADS, [on_host(arrays[name]) for name in names], result)
        return mx.array(result).view(x.dtype)

    def gate(self, y: mx.array) -> mx.array:
        """Of as many threads a block as there are on a device."""
        run = self._run(product_kernel.gate_header(y.dtype), GATE, ["y"], True)
        result = np.zeros((*y.shape[:-1], y.shape[-1] // 2), dtype=np.uint16)
        threads = min(product_kernel.GATE_THREADS, y.size // 16)
        launch(run, -(-(y.size // 16) // threads), threads, [on_host(y)], result)
        return mx.array(result).view(y.dtype)

    def _run(self, header: str, source: str, names: list[str], gated: bool) -> Run:
        key = header + source
        if key not in self._built:
            whole = TYPES + header + (SWIGLU if gated else "")
            self._built[key] = compiled(whole, source, arguments_of(names, "T"), "")
        return self._built[key]
