"""The training loop, the same for the base, the draft and the adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.llama import Model

Batches = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Plan:
    steps: int
    learning_rate: float
    tokens: int = 32768  # a step
    warmup: int = 200
    weight_decay: float = 0.03


def _schedule(plan: Plan) -> Any:
    warmup = min(plan.warmup, max(1, plan.steps // 10))
    rise = optim.linear_schedule(0.0, plan.learning_rate, warmup)
    fall = optim.cosine_decay(plan.learning_rate, max(1, plan.steps - warmup), plan.learning_rate * 0.02)
    return optim.join_schedules([rise, fall], [warmup])


def _dtype() -> mx.Dtype:
    """Half the traffic where the machine has units for it; the CPU is faster in float32."""
    return mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16


def _cast(parameters: Any) -> Any:
    return tree_map(lambda array: array.astype(_dtype()), parameters)


def _loss(model: Model, parameters: Any, ids: mx.array, learn: mx.array) -> Any:
    """Cross entropy on the assistant's words."""
    model.update(_cast(parameters))
    logits = model(ids[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, ids[:, 1:])
    weights = learn[:, 1:].astype(mx.float32)
    return (losses * weights).sum() / mx.maximum(weights.sum(), 1.0)


def _step(model: Model, optimizer: optim.Optimizer) -> Callable[..., Any]:
    gradient = mx.value_and_grad(partial(_loss, model))

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(parameters: Any, ids: mx.array, learn: mx.array) -> tuple[mx.array, Any]:
        loss, gradients = gradient(parameters, ids, learn)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        return loss, optimizer.apply_gradients(gradients, parameters)

    return step


def fit(model: Model, batches: Batches, plan: Plan, label: str) -> None:
    """Trains what is trainable in the model, in place. Parameters stay float32; only their casts are multiplied."""
    parameters = tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters())
    model.update(_cast(model.parameters()))
    optimizer = optim.AdamW(_schedule(plan), betas=[0.9, 0.98], weight_decay=plan.weight_decay, bias_correction=True)
    optimizer.init(parameters)
    step = _step(model, optimizer)
    start, loss = time.perf_counter(), mx.array(0.0)
    for number in range(1, plan.steps + 1):
        ids, learn = next(batches)
        loss, parameters = step(parameters, mx.array(ids.astype(np.int32)), mx.array(learn))
        mx.async_eval(loss, parameters, optimizer.state)  # type: ignore[no-untyped-call]
        if number % max(1, plan.steps // 20) == 0 or number == 10:
            seconds = time.perf_counter() - start
            print(f"{label} step {number} loss {loss.item():.4f} ({seconds:.0f} s)", flush=True)
    model.update(parameters)
    mx.eval(model.parameters())
