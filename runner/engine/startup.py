"""Between loading and serving: the token that proves that the model works."""

from __future__ import annotations

import mlx.core as mx

from runner.engine.loop import Engine
from runner.errors import EngineLoadError
from runner.protocol import Generate


def warm_up(engine: Engine) -> tuple[str, int]:
    """Generate one token through the loop itself; returns the device's name and the bytes in use after it.

    Compiles the kernels of a first prompt, and of rounds with a draft, where a backend compiles them. Raises
    EngineLoadError when no token comes.
    """
    failure = engine.trial(Generate(id=-1, prompt=[0, 0], max_tokens=1))
    if failure is None and mx.default_device() == mx.Device(mx.gpu):
        failure = engine.rehearse()
    if failure is not None:
        raise EngineLoadError(f"the model is loaded, but does not generate: {failure}")
    mx.reset_peak_memory()
    device = mx.default_device()
    name = mx.device_info().get("device_name", "")
    return f"{device.type.name} {name}".strip(), mx.get_active_memory()
