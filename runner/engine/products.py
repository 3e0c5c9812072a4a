"""Where a model's products of few tokens go through `product_kernel`.

Upstream's layers stay the objects that they are, and are of a class that derives from theirs: whoever asks what they
are, wraps them, counts their weights or walks through the model sees no difference. A layer with more than MOST_ROWS
tokens in a call, or tokens of another type, computes as before. MLPs and blocks that compute, to the bit, what
upstream's usual ones do are made of fewer launches: a gate, an input and what follows are one, and a residual sum is
part of the product before it. Where adapters change a layer for the rows of a call, their changes are part of its
product as well; DoRA's are not, and that layer's part of the block is as before.

Each shape of weight is tried on the layer's own weight first, which also compiles its kernels before the engine says
that it is ready. With changes it is tried when the first adapter for it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from runner.engine import cuda_kernels, product_kernel
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import AdaptedLinear, ChangingLinear, RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.joined import JoinedLayers, PartialLinear
from runner.engine.product_kernel import MOST_ROWS, Changed, Multiply

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 0.02
"""Of a product's norm. What rounding does is a tenth of it."""

_TRIED_ROWS: Final = tuple(8 * (tiles - 1) + 1 for tiles in product_kernel.TILES)
"""Of each kernel."""

_BLOCK: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})

Make = Callable[[int, int, mx.Dtype, str], Multiply]
"""How products are made: `product_kernel.multiply`."""

MakeChanged = Callable[[int, int, mx.Dtype, str], Changed]
"""How those with changes are: `product_kernel.changed`."""


@dataclass(slots=True)
class _Shape:
    """The products of layers with weights of one shape. `make` is None where there are none with changes."""

    key: tuple[int, int, mx.Dtype, str]
    multiply: Multiply
    make: MakeChanged | None
    changed: Changed | None = None

    def fits(self, stack: Stack) -> bool:
        """Whether changes may be part of the product."""
        outputs, inputs, dtype, epilogue = self.key
        return product_kernel.fits_changes(outputs * (2 if epilogue == "swiglu" else 1), inputs, dtype, stack)

    def prepare(self, weight: mx.array, stack: Stack) -> None:
        """Try changes, once."""
        if self.make is not None and self.fits(stack):
            self.changed, self.make = _tried_changed(self.make(*self.key), self.key[3], weight, stack), None


class _FewRows:
    """What a layer knows of its products with few tokens: `most` values in a call, of type `dtype`. `added` is what the
    layer's next product is to be added to, and is taken by it if it can; `added_to_changed` waits for the next one with
    changes."""

    __slots__ = ("added", "added_to_changed", "dtype", "most", "shape")

    def __init__(self, shape: _Shape) -> None:
        _, inputs, self.dtype, _ = shape.key
        self.shape, self.most = shape, MOST_ROWS * inputs
        self.added: mx.array | None = None
        self.added_to_changed: mx.array | None = None

    def takes(self, x: mx.array) -> bool:
        """Whether there is a kernel for these tokens."""
        return 0 < x.size <= self.most and x.dtype == self.dtype

    def changed(self, x: mx.array, weight: mx.array, stack: Stack, rows: RowSlots) -> mx.array | None:
        """The product with each row's change, None where it is to be made of several."""
        changed = self.shape.changed
        if changed is None or not self.takes(x) or not self.shape.fits(stack):
            return None
        added, self.added_to_changed = self.added_to_changed, None
        return changed(x, weight, added, stack, rows)


def _product(few: _FewRows, x: mx.array, weight: mx.array) -> mx.array:
    if not few.takes(x):
        return x @ weight.T
    added = few.added
    if added is None:
        return few.shape.multiply(x, weight)
    few.added = None
    return few.shape.multiply(x, weight, added)


class FewRowsLinear(ChangingLinear):
    """A linear layer without a bias. `few_rows` is set when a layer becomes one; `gated` where it is a gate and its
    input of an MLP that computes them at once."""

    few_rows: _FewRows
    gated: _FewRows | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., in]."""
        return _product(self.few_rows, x, self["weight"])

    def changed(self, x: mx.array, stack: Stack, rows: RowSlots) -> mx.array | None:
        """x is [rows, …, in]."""
        return self.few_rows.changed(x, self["weight"], stack, rows)

    def prepare(self, stack: Stack) -> None:
        """Compiles kernels, the first time."""
        (self.gated or self.few_rows).shape.prepare(self["weight"], stack)


class FewRowsEmbedding(nn.Embedding):  # type: ignore[misc]
    """An embedding that may be the output head as well."""

    few_rows: _FewRows

    def as_linear(self, x: mx.array) -> mx.array:
        """x is [..., width]."""
        return _product(self.few_rows, x, self["weight"])


class _FewRowsGated(nn.Module):  # type: ignore[misc]
    """An MLP of gate, input and output, whose first two and what follows are one product."""

    few_rows: _FewRows
    gate_and_input: JoinedLayers

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., in]."""
        few, layer = self.few_rows, self.gate_and_input.layer
        change = layer.change if isinstance(layer, AdaptedLinear) else None
        between: mx.array | None = None
        if change is not None:
            between = few.changed(x, layer.base["weight"], *change)
        elif few.takes(x):
            between = few.shape.multiply(x, layer.weight)
        y: mx.array = super().__call__(x) if between is None else self["down_proj"](between)
        return y


class _FewRowsBlock(nn.Module):  # type: ignore[misc]
    """A block whose two residual sums are part of the products before them."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x is [rows, tokens, width]."""
        attention, mlp = self["self_attn"], self["mlp"]
        norm = self["input_layernorm"]
        h = _sum(x, attention["o_proj"], lambda: attention(norm(x), mask, cache))
        after = self["post_attention_layernorm"]
        return _sum(h, mlp["down_proj"], lambda: mlp(after(h)))


def _sum(x: mx.array, layer: Any, branch: Callable[[], mx.array]) -> mx.array:
    """x + branch(), of which `layer` is the end."""
    changed = isinstance(layer, AdaptedLinear) and layer.change is not None
    few = layer.base.few_rows if isinstance(layer, AdaptedLinear) else layer.few_rows
    if x.dtype != few.dtype:
        return x + branch()
    few.added, few.added_to_changed = (None, x) if changed else (x, None)
    try:
        y = branch()
    finally:
        left = few.added_to_changed if changed else few.added
        few.added = few.added_to_changed = None
    return y if left is None else x + y


def install(model: Any, make: Make | None = None, make_changed: MakeChanged | None = None) -> int:
    """Let the model's products of few tokens be those that `make` makes, and with adapters' changes those that
    `make_changed` does: the kernel's, where there is a device for it.

    To be called when the weights are there and siblings are joined, before any layer is wrapped. Returns how many
    products are made so.
    """
    if make is None:
        if not product_kernel.usable():
            return 0
        make = product_kernel.multiply
        make_changed = product_kernel.changed if cuda_kernels.usable(kernel.SWITCH) else None
    shapes = _Shapes(make, make_changed)
    count = 0
    for layer, kind in _layers(model):
        outputs, inputs = layer.weight.shape
        if not product_kernel.fits(outputs, inputs, layer.weight.dtype):
            continue
        if (shape := shapes.of(layer.weight, outputs, "plain", lambda x, w: x @ w.T)) is not None:
            layer.few_rows = _FewRows(shape)
            layer.__class__ = kind
            count += 1
    _install_gated(model, shapes)
    for module in list(model.modules()):
        if _ends_in_such_products(module) and _is_usual_block(module):
            whole: Any = type(module)
            module.__class__ = _derived(_FewRowsBlock, whole)
    return count


def _layers(model: Any) -> Iterator[tuple[Any, type[Any]]]:
    """Layers that can be replaced, and what by."""
    seen: set[int] = set()
    for module in list(model.modules()):
        layer = module.place[0].layer if type(module) is PartialLinear else module
        kind = {nn.Linear: FewRowsLinear, nn.Embedding: FewRowsEmbedding}.get(type(layer))
        if kind is not None and id(layer) not in seen and "bias" not in layer:
            seen.add(id(layer))
            yield layer, kind


class _Shapes:
    """Products by shape of weight, each tried once."""

    def __init__(self, make: Make, make_changed: MakeChanged | None) -> None:
        self._make = make
        self._make_changed = make_changed
        self._made: dict[tuple[int, int, mx.Dtype, str], _Shape | None] = {}

    def of(self, weight: mx.array, outputs: int, epilogue: str, expected: Multiply) -> _Shape | None:
        """The one with such a weight, if it gives what is expected."""
        key = (outputs, weight.shape[1], weight.dtype, epilogue)
        if key not in self._made:
            multiply = _tried(self._make(*key), expected, weight)
            self._made[key] = None if multiply is None else _Shape(key, multiply, self._make_changed)
        return self._made[key]


def _install_gated(model: Any, shapes: _Shapes) -> None:
    for module in list(model.modules()):
        group = _gate_and_input(module)
        if group is None or not _is_swiglu(module):
            continue
        weight = group.layer.weight
        if (shape := shapes.of(weight, weight.shape[0] // 2, "swiglu", lambda x, w: _gate(x @ w.T))) is not None:
            module.few_rows, module.gate_and_input = _FewRows(shape), group
            group.layer.gated = module.few_rows
            kind: Any = type(module)
            module.__class__ = _derived(_FewRowsGated, kind)


def _gate_and_input(module: Any) -> JoinedLayers | None:
    """Of an MLP that may be one of those, what its first two layers are joined in."""
    gate, up = module.get("gate_proj"), module.get("up_proj")
    if type(gate) is not PartialLinear or type(up) is not PartialLinear or "down_proj" not in module:
        return None
    (group, first), (other, second) = gate.place, up.place
    outputs = set(group.outputs)
    whole = group is other and (first, second) == (0, 1) and len(group.outputs) == 2 and len(outputs) == 1
    whole = whole and type(group.layer) is FewRowsLinear and outputs.pop() % 16 == 0
    return group if whole else None


def _is_swiglu(module: Any) -> bool:
    """Whether it computes what upstream's usual MLP does: to the bit, for small values and for such as are clipped."""
    weight = module.gate_proj.weight
    x = mx.random.normal((1, 2, weight.shape[1]), key=mx.random.key(0)) * mx.array([[1.0], [100.0]])
    x = x.astype(weight.dtype)
    try:
        usual = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
        return bool(mx.array_equal(module(x), usual, equal_nan=True).item())
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return False
    finally:
        module.gate_proj.place[0].forget()


def _ends_in_such_products(module: Any) -> bool:
    """Whether it has the parts of upstream's usual block, and attention and MLP end in a product with few rows."""
    if not module.keys() >= _BLOCK or [*signature(type(module).__call__).parameters] != ["self", "x", "mask", "cache"]:
        return False
    ends = module["self_attn"].get("o_proj"), module["mlp"].get("down_proj")
    return all(type(end) is FewRowsLinear for end in ends)


def _is_usual_block(module: Any) -> bool:
    """Whether it computes what upstream's usual block does, to the bit."""
    width = module.mlp.down_proj.weight.shape[0]
    x = mx.random.normal((1, 2, width), key=mx.random.key(0)).astype(module.mlp.down_proj.weight.dtype)
    try:
        h = x + module.self_attn(module.input_layernorm(x), None, None)
        usual = h + module.mlp(module.post_attention_layernorm(h))
        return bool(mx.array_equal(module(x, None, None), usual, equal_nan=True).item())
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return False


@cache
def _derived(first: Any, kind: Any) -> type[Any]:
    # Its module is upstream's, since that is where others look for what it calls.
    return type(f"FewRows{kind.__name__}", (first, kind), {"__module__": kind.__module__})


def _gate(y: mx.array) -> mx.array:
    result: mx.array = swiglu(*mx.split(y, 2, axis=-1))
    return result


def _tried(multiply: Multiply, expected: Multiply, weight: mx.array) -> Multiply | None:
    """`multiply`, if it gives what is expected for each number of rows that it has a kernel for."""
    return multiply if _right(lambda x: multiply(x, weight), lambda x: expected(x, weight), weight) else None


def _tried_changed(changed: Changed, epilogue: str, weight: mx.array, stack: Stack) -> Changed | None:
    """The same of products with changes: rows of all slots."""
    slots = stack.down.shape[0]

    def rows_of(x: mx.array) -> RowSlots:
        return RowSlots.of([slots - 1 - row % slots for row in range(x.shape[1])])

    def found(x: mx.array) -> mx.array:
        return changed(x.swapaxes(0, 1), weight, None, stack, rows_of(x)).swapaxes(0, 1)

    def expected(x: mx.array) -> mx.array:
        which = rows_of(x).slots
        change = (x.swapaxes(0, 1) @ stack.a[which]) @ stack.b[which]
        y = x @ weight.T + change.swapaxes(0, 1)
        return _gate(y) if epilogue == "swiglu" else y

    return changed if _right(found, expected, weight) else None


def _right(found: Callable[[mx.array], mx.array], expected: Callable[[mx.array], mx.array], weight: mx.array) -> bool:
    """Whether both give the same for tokens [1, rows, inputs]."""
    try:
        for rows in _TRIED_ROWS:
            x = mx.random.normal((1, rows, weight.shape[1]), key=mx.random.key(rows)).astype(weight.dtype)
            exact = expected(x).astype(mx.float32)
            wrong = mx.linalg.norm(found(x).astype(mx.float32) - exact)
            if not (wrong <= _TOLERANCE * mx.linalg.norm(exact)).item():
                logger.warning("products of few tokens are MLX's", extra={"shape": weight.shape, "rows": rows})
                return False
    except (ValueError, RuntimeError) as failure:
        logger.warning("products of few tokens are MLX's", extra={"shape": weight.shape, "reason": str(failure)})
        return False
    return True
