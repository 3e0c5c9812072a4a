"""Where a model's products go through kernels.

Upstream's layers stay the objects that they are, and are of a class that derives from theirs: whoever asks what they
are, wraps them, counts their weights or walks through the model sees no difference. Products of up to MOST_ROWS tokens
are `product_kernel`'s, those of up to 128 `wide_product_kernel`'s where it can be. MLPs and blocks that compute, to the
bit, what upstream's usual ones do are made of fewer launches: a gate, an input and what follows are one, and a residual
sum is part of the product before it. Where adapters change a layer for the rows of a call, their changes are part of
its product as well; DoRA's are not, and that layer's part of the block is as before.

Products of more tokens are MLX's, which takes the residual sum into them, and an MLP's gate is a launch. Changes of
more than MOST_ROWS tokens are a launch as well, with the sum or the gate in it, or MLX's products after the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from runner.engine import product_kernel
from runner.engine.adapters import kernel
from runner.engine.adapters.layers import AdaptedLinear, ChangingLinear, RowSlots
from runner.engine.adapters.stack import Stack
from runner.engine.joined import JoinedLayers, PartialLinear
from runner.engine.product_shapes import Kernels, Shape, Shapes, kernels

_BLOCK: Final = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})


class _Product:
    """A layer's product by the kernels of its shape, and what follows it; `plain` is the same without that. `added` is
    what the layer's next product is to be added to, and is taken by it if it can; `added_to_changed` waits for the next
    one with changes."""

    __slots__ = ("added", "added_to_changed", "plain", "shape")

    def __init__(self, shape: Shape, plain: _Product | None = None) -> None:
        self.shape = shape
        self.plain = plain or self
        self.added: mx.array | None = None
        self.added_to_changed: mx.array | None = None

    def __call__(self, x: mx.array, weight: mx.array) -> mx.array:
        """x [..., in] times the weight."""
        added, multiply = self.added, self.shape.product(x)
        if added is None:
            return x @ weight.T if multiply is None else multiply(x, weight)
        if x.dtype != self.shape.dtype:
            return x @ weight.T
        self.added = None
        return mx.addmm(added, x, weight.T) if multiply is None else multiply(x, weight, added)

    def gated(self, x: mx.array, weight: mx.array) -> mx.array | None:
        """What is between an MLP's input and its output, None where that is to be made of several."""
        shape = self.shape
        if (multiply := shape.product(x)) is not None:
            return multiply(x, weight)
        gate = shape.kernels.gate
        return None if gate is None or x.dtype != shape.dtype else gate(x @ weight.T)

    def changed(self, x: mx.array, weight: mx.array, stack: Stack, rows: RowSlots) -> mx.array | None:
        """The product with each row's change, and what follows; None where that is to be made of several."""
        shape = self.shape
        if (changed := shape.changed(x, stack)) is not None:
            return changed(x, weight, self._taken(), stack, rows)
        add_changes = shape.kernels.add_changes
        if add_changes is None or x.dtype != shape.dtype or not kernel.fits(x, stack):
            if stack.magnitude is None and x.dtype == shape.dtype and shape.product(x) is None:
                # MLX's product of the base takes it; DoRA's factor is for the product alone.
                self.added = self._taken()
            return None
        return add_changes(x, self.plain(x, weight), stack, rows, self._taken(), shape.epilogue)

    def _taken(self) -> mx.array | None:
        added, self.added_to_changed = self.added_to_changed, None
        return added


class FewRowsLinear(ChangingLinear):
    """A linear layer without a bias. `product` is set when a layer becomes one; `gated` where it is a gate and its
    input of an MLP that computes them at once."""

    product: _Product
    gated: _Product | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., in]."""
        return self.product(x, self["weight"])

    def changed(self, x: mx.array, stack: Stack, rows: RowSlots) -> mx.array | None:
        """x is [rows, …, in]."""
        return self.product.changed(x, self["weight"], stack, rows)

    def prepare(self, stack: Stack) -> None:
        """Compiles kernels, the first time."""
        (self.gated or self.product).shape.prepare(self["weight"], stack)

    def takes_all(self, stack: Stack) -> bool:
        """Whether changes are kernels' however many tokens there are."""
        return (self.gated or self.product).shape.takes_all(stack)


class FewRowsEmbedding(nn.Embedding):  # type: ignore[misc]
    """An embedding that may be the output head as well."""

    product: _Product

    def as_linear(self, x: mx.array) -> mx.array:
        """x is [..., width]."""
        return self.product(x, self["weight"])


class _FewRowsGated(nn.Module):  # type: ignore[misc]
    """An MLP of gate, input and output, whose first two and what follows are one product."""

    product: _Product
    gate_and_input: JoinedLayers

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., in]."""
        product, layer = self.product, self.gate_and_input.layer
        change = layer.change if isinstance(layer, AdaptedLinear) else None
        if change is None:
            between = product.gated(x, layer.weight)
        else:
            between = product.changed(x, layer.base["weight"], *change)
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
    product = layer.base.product if isinstance(layer, AdaptedLinear) else layer.product
    if x.dtype != product.shape.dtype:
        return x + branch()
    product.added, product.added_to_changed = (None, x) if changed else (x, None)
    try:
        y = branch()
    finally:
        left = product.added if product.added_to_changed is None else product.added_to_changed
        product.added = product.added_to_changed = None
    return y if left is None else x + y


def install(model: Any, how: Kernels | None = None) -> int:
    """Let the model's products go through kernels, those of the device where there is one.

    To be called when the weights are there and siblings are joined, before any layer is wrapped. Returns how many
    products are made so.
    """
    if (how := how or kernels()) is None:
        return 0
    shapes = Shapes(how)
    count = 0
    for layer, kind in _layers(model):
        outputs, inputs = layer.weight.shape
        if not product_kernel.fits(outputs, inputs, layer.weight.dtype):
            continue
        if (shape := shapes.plain(layer.weight)) is not None:
            layer.product = _Product(shape)
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


def _install_gated(model: Any, shapes: Shapes) -> None:
    for module in list(model.modules()):
        group = _gate_and_input(module)
        if group is None or not _is_swiglu(module):
            continue
        if (shape := shapes.gated(group.layer.weight)) is not None:
            module.product, module.gate_and_input = _Product(shape, group.layer.product), group
            group.layer.gated = module.product
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
