"""Whether an adapter fits a model, before anything is changed: a layer for every tensor, and of its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn
import msgspec
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from runner.engine.adapters.formats import Adapter, AdapterRefusal, LowRank


class AdaptableModules(msgspec.Struct, frozen=True):
    """A model's layers by path: those that take an adapter, and why the others do not.

    `blocks` are the mixture blocks around its layers of experts, `depth` is how many blocks the model has.
    """

    layers: Mapping[str, Any]
    blocks: Mapping[str, Any]
    refused: Mapping[str, str]
    depth: int


def adaptable_modules(model: Any) -> AdaptableModules:
    """To be called before any layer is wrapped."""
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            if isinstance(modules.get(parent), SwitchGLU | SwitchMLP):
                layers[path], blocks[parent] = module, modules[parent]
            else:
                refused[path] = "a layer of experts outside a mixture block"
        elif isinstance(module, nn.Linear | nn.QuantizedLinear):
            if ".experts." in path:
                refused[path] = "a single expert of a mixture, whose tokens come from several rows"
            else:
                layers[path] = module
        elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            refused[path] = "an embedding"
        elif path:
            refused[path] = f"a {_name(module)}"
    return AdaptableModules(layers, blocks, refused, len(getattr(model, "layers", ())))


def _name(module: Any) -> str:
    """Of its class as upstream has it, which may be served by one of ours."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "runner")


def check(adapter: Adapter, modules: AdaptableModules) -> dict[str, LowRank]:
    """The adapter's changes by the model's own paths. Raises AdapterRefusal, naming what does not fit."""
    resolved: dict[str, LowRank] = {}
    for name, change in adapter.layers.items():
        path = _resolve(name, modules)
        _check_shape(path, change, modules.layers[path])
        resolved[path] = change
    if not resolved:
        raise AdapterRefusal("the adapter has no tensors: it would change nothing")
    for path in _declared(adapter, modules):
        if path not in resolved:
            raise AdapterRefusal(f"{path} is listed in adapter_config.json, but has no tensors")
    return resolved


def _resolve(name: str, modules: AdaptableModules) -> str:
    """The path of the layer an adapter calls `name`: the same, or the one path that ends so."""
    if name in modules.layers:
        return name
    ending = [path for path in modules.layers if path.endswith(f".{name}")]
    if len(ending) == 1:
        return ending[0]
    if (what := modules.refused.get(name)) is not None:
        raise AdapterRefusal(f"{name} is {what}, which takes no adapter here")
    if (block := _block_of(name)) is not None and block >= modules.depth:
        raise AdapterRefusal(f"{name}: the model has {modules.depth} blocks only; the adapter is for another model")
    raise AdapterRefusal(f"{name}: the model has no such layer; the adapter is for another model")


def _block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _check_shape(path: str, change: LowRank, base: Any) -> None:
    experts, inputs, outputs = layer_shape(base)
    a, b = change.a.shape, change.b.shape
    if len(a) != len(b) or a[-1] != b[-2] or a[:-2] != b[:-2]:
        raise AdapterRefusal(f"{path}: lora_a and lora_b do not multiply ({a} and {b} as [in, r] and [r, out])")
    if a[:-2] != experts:
        raise AdapterRefusal(f"{path}: the adapter has {_experts(a[:-2])}, the model's layer {_experts(experts)}")
    if (a[-2], b[-1]) != (inputs, outputs):
        raise AdapterRefusal(f"{path}: the adapter maps {a[-2]} to {b[-1]}, the model's layer {inputs} to {outputs}")
    if change.magnitude is not None:
        if experts:
            raise AdapterRefusal(f"{path}: DoRA on a layer of experts is not supported")
        if change.magnitude.shape != (outputs,):
            raise AdapterRefusal(f"{path}: the magnitude has shape {change.magnitude.shape}, not ({outputs},)")


def layer_shape(base: Any) -> tuple[tuple[int, ...], int, int]:
    """Experts (none for a plain layer), inputs and outputs."""
    if isinstance(base, SwitchLinear | QuantizedSwitchLinear):
        return (base.num_experts,), base.input_dims, base.output_dims
    outputs, inputs = base.weight.shape
    return (), inputs * 32 // base.bits if isinstance(base, nn.QuantizedLinear) else inputs, outputs


def _experts(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} experts" if shape else "no experts"


def _declared(adapter: Adapter, modules: AdaptableModules) -> Iterator[str]:
    """Paths that the adapter's configuration names, of layers that exist."""
    first = modules.depth - adapter.last_layers if adapter.last_layers > 0 else 0
    for path in modules.layers:
        block = _block_of(path)
        if block is None:
            continue
        inside = path.split(f".{block}.", 1)[1]
        if inside in adapter.keys and block >= first:
            yield path
