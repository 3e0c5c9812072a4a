"""From a spec to an engine that serves: model, draft, adapters, and the token that proves that they work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import mlx.core as mx
import msgspec

from runner.engine import cuda_kernels, environment
from runner.engine.kv.quantised import Quantisation
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel, load
from runner.engine.memory import ask_for
from runner.engine.watchdog import Watchdog, in_use_beside, resident, trim
from runner.errors import EngineLoadError
from runner.protocol import EngineSpec, FromEngine, Generate, Loaded, Sampling

if TYPE_CHECKING:
    # The loop is imported beside the weights, a draft's modules where there is one.
    from runner.engine.loop import Engine
    from runner.engine.speculative.speculation import Speculation

_SOME: Final = tuple(
    Generate(id=-1, prompt=[0] * 3 * length, max_tokens=3 * length, sampling=Sampling(temperature=0.7, top_p=0.9))
    for length in (3, 1, 2)
)
"""Requests that end one after the other."""


class Ready(msgspec.Struct, frozen=True):
    """An engine that has generated a token, what watches the memory it takes, and what runners are told of it."""

    engine: Engine
    watchdog: Watchdog
    loaded: Loaded


def start(
    spec: EngineSpec,
    began: float,
    stage: Callable[[str], None],
    emit: Callable[[FromEngine], None],
    wake: Callable[[], None],
) -> Ready:
    """The engine that `spec` describes. Raises EngineLoadError.

    `began` is when the process did, by `time.monotonic`; `stage` is told what is being done; `emit` and `wake` are as
    `loop.Engine` has them.
    """
    stage("weights")
    cuda_kernels.settle()
    ask_for(spec.memory_limit_bytes)
    model, speculation, notes = _models(spec)
    engine = _engine(spec, model, speculation, emit, wake)
    stage("adapters")
    _load_adapters(spec, engine)
    stage("warmup")
    device, active_bytes = _warm_up(engine)
    trim()
    base = resident() - active_bytes  # Python and the libraries, all of which have been used by now
    watchdog = Watchdog(lambda: engine.budget.most, engine.release, lambda: in_use_beside(base), trim)
    loaded = Loaded(
        weights_bytes=model.weights_bytes + (speculation.weights_bytes if speculation else 0),
        active_bytes=active_bytes,
        seconds=time.monotonic() - began,
        max_context=engine.intake.context(engine.limits),
        device=device,
        architecture=model.architecture,
        notes=[*environment.notes(os.environ), *model.notes, *notes, *_context_note(spec, model.max_context)],
    )
    return Ready(engine, watchdog, loaded)


def _models(spec: EngineSpec) -> tuple[LoadedModel, Speculation | None, list[str]]:
    """The model, what its draft makes of it, and notes on that."""
    if not spec.draft:
        return _model(spec, 0), None, []
    from runner.engine.speculative.loading import slack_for, speculate  # noqa: PLC0415

    slack = slack_for(spec.num_draft_tokens)
    model = _model(spec, slack)
    return model, *speculate(Path(spec.draft), model, slack, trust_remote_code=spec.trust_draft_code)


def _model(spec: EngineSpec, slack: int) -> LoadedModel:
    return load(
        Path(spec.path),
        spec.tool_parser,
        slack,
        Quantisation(spec.kv_bits, spec.kv_group_size, spec.kv_start) if spec.kv_bits else None,
        spec.chat_template,
        spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        meanwhile=lambda: import_module("runner.engine.loop"),
    )


def _engine(
    spec: EngineSpec,
    model: LoadedModel,
    speculation: Speculation | None,
    emit: Callable[[FromEngine], None],
    wake: Callable[[], None],
) -> Engine:
    from runner.engine.loop import Engine  # noqa: PLC0415

    engine = Engine(model, Limits.of(spec), emit, spec.memory_limit_bytes, wake, speculation)
    engine.budget.granted, engine.budget.working = spec.budget_bytes, spec.working_bytes
    engine.budget.row_bytes = spec.row_bytes
    return engine


def _load_adapters(spec: EngineSpec, engine: Engine) -> None:
    for adapter in spec.adapters:
        try:
            engine.load_adapter(adapter)
        except EngineLoadError as refusal:
            raise EngineLoadError(f"adapter {adapter.path}: {refusal.message}", hint=refusal.hint) from refusal


def _warm_up(engine: Engine) -> tuple[str, int]:
    """Generate one token through the loop itself; returns the device's name and the bytes in use after it.

    Where a backend compiles kernels, those of rows that come, draw and leave others behind are compiled, and those of
    rounds with a draft: MLX takes seconds for some, in which all requests would wait. Raises EngineLoadError when no
    token comes.
    """
    failure = engine.trial(Generate(id=-1, prompt=[0, 0], max_tokens=1))
    if failure is None and mx.default_device() == mx.Device(mx.gpu):
        failure = engine.trial(*_SOME) or engine.rehearse()
    if failure is not None:
        raise EngineLoadError(f"the model is loaded, but does not generate: {failure}")
    mx.reset_peak_memory()
    device = mx.default_device()
    name = mx.device_info().get("device_name", "")
    return f"{device.type.name} {name}".strip(), mx.get_active_memory()


def _context_note(spec: EngineSpec, own: int) -> list[str]:
    if own and spec.max_context > own:
        return [f"max_context {spec.max_context} is beyond the model's {own} tokens, which hold"]
    return []
