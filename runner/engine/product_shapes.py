"""The kernels that products of one shape go through: each is tried on a layer's own weight first.

That also compiles it before the engine says that it is ready. With changes it is tried when the first adapter for such
a shape is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import mlx.core as mx
import msgspec
from mlx_lm.models.activations import swiglu

from runner.engine import (
    cuda_kernels,
    product_kernel,
    prompt_changes,
    wide_changed_kernel,
    wide_changes,
    wide_product_kernel,
)
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.product_kernel import MOST_ROWS, TILES, Changed, Multiply
from runner.engine.wide_changed_kernel import Fits

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 0.02
"""Of a product's norm. What rounding does is a tenth of it."""

_FEW_BESIDE_WIDE: Final = {"plain": 16, "swiglu": 0}
"""Tokens up to which the kernel for few is the faster one where there is one for more, without changes."""

_ROWS: Final = tuple(8 * (eights - 1) + 1 for eights in TILES)
_MORE_ROWS: Final = tuple(most - 7 for most in wide_product_kernel.TOKENS)
"""Of each kernel some."""

_PROMPTS: Final = (3, 50)
"""Rows, and tokens of each."""

Make = Callable[[int, int, mx.Dtype, str], Multiply]
"""How products of few tokens are made: `product_kernel.multiply`, `wide_product_kernel.multiply`."""

MakeChanged = Callable[[int, int, mx.Dtype, str], Changed]
"""How those with changes are: `product_kernel.changed`, and what there is in `wide_changed_kernel`, `wide_changes`."""

AddChanges = Callable[[mx.array, mx.array, Stack, RowSlots, mx.array | None, str], mx.array]
"""From tokens, what a product has made of them, and each row's change and slot: as `adapters.kernel.add_changes`."""

Gate = Callable[[mx.array], mx.array]
"""From a product of an MLP's gate and input, one behind the other, what is between those and its output."""


class Kernels(msgspec.Struct, frozen=True):
    """What there is. MLX's operations stand for those that are None."""

    multiply: Make
    changed: MakeChanged | None = None
    add_changes: AddChanges | None = None
    gate: Gate | None = None
    wide: Make | None = None
    """For more tokens than `multiply` takes, up to `wide_product_kernel.MOST_ROWS`; weights that it fits."""

    wide_changed: tuple[tuple[MakeChanged, Fits], ...] = ()
    """The same with changes: the first that fits them is used."""

    prompts_changed: tuple[MakeChanged, Fits] | None = None
    """For more tokens, many of a row, with changes that they fit."""


def kernels() -> Kernels | None:
    """Those of the device, None where there is none for them."""
    if not product_kernel.usable():
        return None
    wide = wide_product_kernel.multiply if wide_product_kernel.usable() else None
    if not cuda_kernels.usable(kernel.SWITCH):
        return Kernels(product_kernel.multiply, gate=product_kernel.gate, wide=wide)
    wide_changed: tuple[tuple[MakeChanged, Fits], ...] = (
        *((partial(wide_changed_kernel.changed, choose=choose), fits) for choose, fits in wide_changed_kernel.WAYS),
        (wide_changes.changed, wide_changes.fits),
    )
    return Kernels(
        product_kernel.multiply,
        product_kernel.changed,
        _add_changes,
        product_kernel.gate,
        wide,
        wide_changed if wide else (),
        (prompt_changes.changed, prompt_changes.fits),
    )


def _add_changes(
    x: mx.array, y: mx.array, stack: Stack, rows: RowSlots, added: mx.array | None, epilogue: str
) -> mx.array:
    return kernel.add_changes(x, y, stack, rows.board(), added, epilogue)


class Shape:
    """The products of layers with weights of one shape, [outputs, inputs], or of twice as many outputs for "swiglu"."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        dtype: mx.Dtype,
        epilogue: str,
        multiply: Multiply,
        kernels: Kernels,
        wide: Multiply | None,
    ) -> None:
        self.inputs, self.dtype, self.epilogue = inputs, dtype, epilogue
        self.kernels = kernels
        self._multiply, self._wide = multiply, wide
        self._outputs = outputs
        self._changed: Changed | None = None
        self._prompts_changed: Changed | None = None
        self._wide_changed: dict[MakeChanged, Changed] = {}
        self._prepared: set[MakeChanged] = set()

    def prepare(self, weight: mx.array, stack: Stack) -> None:
        """Try changes, once."""
        # They are compiled side by side from here on.
        few = self._made(self.kernels.changed, self._fits(stack))
        make_prompts, _ = self.kernels.prompts_changed or (None, None)
        prompts = self._made(make_prompts, self._fits_prompts(stack))
        wanted = [*self._fitting(stack)]
        first = {make: self._made(make) for make in wanted[:1]}
        if few is not None:
            self._changed = _tried_changed(few, self.epilogue, weight, stack, [(rows, 1) for rows in _ROWS])
        if prompts is not None:
            self._prompts_changed = _tried_changed(prompts, self.epilogue, weight, stack, [_PROMPTS])
        for make in wanted:
            if make in self._wide_changed:
                return
            many = first.pop(make, None) or self._made(make)
            counts = [(rows, 1) for rows in _MORE_ROWS]
            if many and (right := _tried_changed(many, self.epilogue, weight, stack, counts)):
                self._wide_changed[make] = right
                return

    def _made(self, make: MakeChanged | None, fits: bool = True) -> Changed | None:
        """The first time that it fits."""
        if make is None or not fits or make in self._prepared:
            return None
        self._prepared.add(make)
        return make(self._outputs, self.inputs, self.dtype, self.epilogue)

    def product(self, x: mx.array) -> Multiply | None:
        """The kernel for these tokens, None where there is none."""
        if self._few(x, MOST_ROWS if self._wide is None else _FEW_BESIDE_WIDE[self.epilogue]):
            return self._multiply
        return self._wide if self._many(x) else None

    def changed(self, x: mx.array, stack: Stack) -> Changed | None:
        """The product with changes, None where it is to be made of several."""
        if self._wide_changed and self._many(x):
            right = self._wide_changed
            if wide := next((right[make] for make in self._fitting(stack) if make in right), None):
                return wide
        if self._few(x, MOST_ROWS):
            return self._changed if self._changed is not None and self._fits(stack) else None
        prompts = self._prompts_changed is not None and x.dtype == self.dtype and prompt_changes.applies(x)
        return self._prompts_changed if prompts and self._fits_prompts(stack) else None

    def takes_all(self, stack: Stack) -> bool:
        """Whether there are products with such changes for any number of tokens."""
        prompts = self._prompts_changed is not None and self._fits_prompts(stack)
        return prompts and any(make in self._wide_changed for make in self._fitting(stack))

    def _few(self, x: mx.array, most: int) -> bool:
        return 0 < x.size <= most * self.inputs and x.dtype == self.dtype

    def _many(self, x: mx.array) -> bool:
        return 0 < x.size <= wide_product_kernel.MOST_ROWS * self.inputs and x.dtype == self.dtype

    def _fits(self, stack: Stack) -> bool:
        outputs = self._outputs * kernel.parts(self.epilogue)
        return product_kernel.fits_changes(outputs, self.inputs, self.dtype, stack)

    def _fits_prompts(self, stack: Stack) -> bool:
        return self.kernels.prompts_changed is not None and self.kernels.prompts_changed[1](*self._what, stack)

    def _fitting(self, stack: Stack) -> Iterator[MakeChanged]:
        """Those for more tokens; none where such products are MLX's."""
        if self._wide is not None:
            yield from (make for make, fits in self.kernels.wide_changed if fits(*self._what, stack))

    @property
    def _what(self) -> tuple[int, int, mx.Dtype, str]:
        return self._outputs, self.inputs, self.dtype, self.epilogue


class Shapes:
    """Products by shape of weight."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._made: dict[tuple[int, int, mx.Dtype, str], Shape | None] = {}

    def plain(self, weight: mx.array) -> Shape | None:
        """That of a layer's product, if its kernels give what is expected."""
        return self._of(weight, weight.shape[0], "plain", lambda x, w: x @ w.T)

    def gated(self, weight: mx.array) -> Shape | None:
        """The same of an MLP's gate and input, and what follows."""
        return self._of(weight, weight.shape[0] // 2, "swiglu", lambda x, w: _gate(x @ w.T))

    def _of(self, weight: mx.array, outputs: int, epilogue: str, expected: Multiply) -> Shape | None:
        key = (outputs, weight.shape[1], weight.dtype, epilogue)
        if key not in self._made:
            make = self._kernels.wide if wide_product_kernel.fits(*key) else None
            # They are compiled side by side from here on.
            few, many = self._kernels.multiply(*key), make and make(*key)
            multiply, wide = _tried(few, expected, weight, _ROWS), many and _tried(many, expected, weight, _MORE_ROWS)
            self._made[key] = None if multiply is None else Shape(*key, multiply, self._kernels, wide)
        return self._made[key]


def _gate(y: mx.array) -> mx.array:
    result: mx.array = swiglu(*mx.split(y, 2, axis=-1))
    return result


def _tried(multiply: Multiply, expected: Multiply, weight: mx.array, rows: Sequence[int]) -> Multiply | None:
    """`multiply`, if it gives what is expected for so many rows."""
    counts = [(1, count) for count in rows]
    return multiply if _right(lambda x: multiply(x, weight), lambda x: expected(x, weight), weight, counts) else None


def _tried_changed(
    changed: Changed, epilogue: str, weight: mx.array, stack: Stack, counts: Sequence[tuple[int, int]]
) -> Changed | None:
    """The same of products with changes, for so many rows, of all slots, with so many tokens each."""
    slots = stack.down.shape[0]

    def rows_of(x: mx.array) -> RowSlots:
        return RowSlots.of([slots - 1 - row % slots for row in range(x.shape[0])])

    def found(x: mx.array) -> mx.array:
        return changed(x, weight, None, stack, rows_of(x))

    def expected(x: mx.array) -> mx.array:
        which = rows_of(x).slots
        y = x @ weight.T + (x @ stack.a[which]) @ stack.b[which]
        return _gate(y) if epilogue == "swiglu" else y

    return changed if _right(found, expected, weight, counts) else None


def _right(
    found: Callable[[mx.array], mx.array],
    expected: Callable[[mx.array], mx.array],
    weight: mx.array,
    counts: Sequence[tuple[int, int]],
) -> bool:
    """Whether both give the same for tokens [rows, tokens, inputs], for each of such numbers."""
    try:
        for rows, tokens in counts:
            key = mx.random.key(rows * tokens)
            x = mx.random.normal((rows, tokens, weight.shape[1]), key=key).astype(weight.dtype)
            exact = expected(x).astype(mx.float32)
            wrong = mx.linalg.norm(found(x).astype(mx.float32) - exact)
            if not (wrong <= _TOLERANCE * mx.linalg.norm(exact)).item():
                logger.warning("products of few tokens are MLX's", extra={"shape": weight.shape, "rows": rows * tokens})
                return False
    except (ValueError, RuntimeError) as failure:
        logger.warning("products of few tokens are MLX's", extra={"shape": weight.shape, "reason": str(failure)})
        return False
    return True
