"""Linear layers whose weights lie in blocks (`weight_blocks.py`)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.engine.direct import plain_layers
from runner.engine.joined import PartialLinear
from runner.engine.weight_blocks import LINES, fit, laid_out, multiply


class _Blocked(nn.Module):  # type: ignore[misc]
    blocks: mx.array
    """[outputs / LINES, inputs, LINES]."""

    @property
    def weight(self) -> mx.array:
        """[outputs, inputs], of which only shape and type are there for nothing: its numbers are a copy."""
        return self.blocks.swapaxes(1, 2).reshape(-1, self.blocks.shape[1])


class BlockedLinear(_Blocked, nn.Linear):  # type: ignore[misc]
    """A linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """x is [..., inputs]."""
        y = multiply(x, self.blocks)
        return y + self.bias if "bias" in self else y


class BlockedPart(_Blocked, PartialLinear):
    """One that is computed with its siblings. Its blocks are a view of theirs."""


def install(model: Any) -> None:
    """On the CPU, have the model's linear layers lie in blocks, where that is faster.

    To be called once siblings are joined, and before any layer is wrapped. What is new is not computed yet.
    """
    parts = [module for module in model.modules() if type(module) is PartialLinear]
    outputs = {id(part.place[0].layer): part.place[0].outputs for part in parts}
    for layer in plain_layers(model):
        if type(layer) is nn.Linear and fit(layer.weight, outputs.get(id(layer), layer.weight.shape[:1])):
            layer.blocks = laid_out(layer.pop("weight"))
            layer.__class__ = BlockedLinear
    for part in parts:
        group, index = part.place
        if type(group.layer) is BlockedLinear:
            first, count = sum(group.outputs[:index]) // LINES, group.outputs[index] // LINES
            del part["weight"]
            part.blocks = group.layer.blocks[first : first + count]
            part.__class__ = BlockedPart
