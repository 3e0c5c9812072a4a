"""Whether an adapter fits its base, by the engine's rules (`runner.engine.adapters.check`), on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from runner.inspect.adapter import AdapterFacts, Change
from runner.inspect.layers import Layer, Layers
from runner.inspect.tensors import at_block, first_block


def misfit(adapter: AdapterFacts, model: Layers) -> str:
    """Why the adapter cannot be used with the model, naming a layer; empty where it can."""
    found: dict[str, int] = {}
    for change in adapter.changes:
        reached = 0
        for layer, blocks in targets(change, model):
            if why := _wrong_shape(change, layer, blocks):
                return why
            found[layer.path] = found.get(layer.path, 0) | blocks
            reached |= blocks
        missing = change.blocks & ~reached
        if missing or (not change.blocks and change.layer not in found and not _single(change, model)):
            return _unknown(change, missing, model)
    if not adapter.changes:
        return "the adapter has no tensors: it would change nothing"
    for layer, blocks in _declared(adapter, model):
        if left := blocks & ~found.get(layer.path, 0):
            path = at_block(layer.path, first_block(left))
            return f"{path} is listed in adapter_config.json, but has no tensors"
    return ""


def _single(change: Change, model: Layers) -> Layer | None:
    """The layer that a name without a block's number means."""
    exact = [layer for layer in model.linear if layer.path == change.layer and not layer.blocks]
    ending = exact or [layer for layer in model.linear if layer.path.endswith(f".{change.layer}")]
    return ending[0] if len(ending) == 1 and ending[0].blocks.bit_count() <= 1 else None


def targets(change: Change, model: Layers) -> Iterator[tuple[Layer, int]]:
    """The layers that a change is for, with the blocks in which it is: of the same path, or the one that ends so."""
    if not change.blocks:
        if (single := _single(change, model)) is not None:
            yield single, 0
        return
    left = change.blocks
    for layer in model.linear:
        if layer.path == change.layer and layer.blocks & left:
            yield layer, layer.blocks & left
            left &= ~layer.blocks
    if not left:
        return
    ending = [layer for layer in model.linear if layer.path.endswith(f".{change.layer}")]
    once = twice = 0
    for layer in ending:
        twice |= once & layer.blocks
        once |= layer.blocks
    for layer in ending:
        if blocks := layer.blocks & left & ~twice:
            yield layer, blocks


def _unknown(change: Change, missing: int, model: Layers) -> str:
    block = first_block(missing)
    name = at_block(change.layer, block)
    if (what := model.refused.get(change.layer)) is not None:
        return f"{name} is {what}, which takes no adapter here"
    if change.blocks and missing >> model.depth:
        name = at_block(change.layer, max(block, model.depth))
        blocks = "1 block" if model.depth == 1 else f"{model.depth} blocks"
        return f"{name}: the model has {blocks} only; the adapter is for another model"
    return f"{name}: the model has no such layer; the adapter is for another model"


def _wrong_shape(change: Change, layer: Layer, blocks: int) -> str:
    path = at_block(layer.path, first_block(blocks))
    a, b = change.a, change.b
    if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2] or a[:-2] != b[:-2]:
        return f"{path}: lora_a and lora_b do not multiply ({a} and {b} as [in, r] and [r, out])"
    if a[:-2] != layer.experts:
        return f"{path}: the adapter has {_experts(a[:-2])}, the model's layer {_experts(layer.experts)}"
    inputs = layer.inputs or a[-2]  # 0: how it is packed does not tell
    if (a[-2], b[-1]) != (inputs, layer.outputs):
        return f"{path}: the adapter maps {a[-2]} to {b[-1]}, the model's layer {inputs} to {layer.outputs}"
    if change.magnitude is not None:
        if layer.experts:
            return f"{path}: DoRA on a layer of experts is not supported"
        if change.magnitude != (layer.outputs,):
            return f"{path}: the magnitude has shape {change.magnitude}, not ({layer.outputs},)"
    return ""


def _experts(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} experts" if shape else "no experts"


def _declared(adapter: AdapterFacts, model: Layers) -> Iterator[tuple[Layer, int]]:
    """Layers that the adapter's configuration names, with the blocks in which it should change them."""
    first = model.depth - adapter.last_layers if adapter.last_layers > 0 else 0
    for layer in model.linear:
        inside = layer.path.partition(".*.")[2]
        if inside in adapter.keys and (blocks := layer.blocks & (-1 << max(0, first))):
            yield layer, blocks
