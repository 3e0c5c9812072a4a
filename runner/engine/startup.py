"""What happens between loading and serving: memory limits, and the token that proves the model works."""

from __future__ import annotations

import mlx.core as mx

from runner.engine.loop import Engine
from runner.errors import EngineLoadError
from runner.protocol import Generate


def memory_limit(limit: int) -> None:
    """Ask MLX to stay within `limit` bytes; 0 for its own default. It is a guideline to MLX, not a wall.

    On Metal the model's memory is also wired, so that it is not paged out between requests.
    """
    if limit:
        mx.set_memory_limit(limit)
    if mx.metal.is_available():
        wired = int(mx.device_info().get("max_recommended_working_set_size", 0))
        if wired:
            mx.set_wired_limit(min(wired, limit) if limit else wired)


def warm_up(engine: Engine) -> tuple[str, int]:
    """Generate one token through the loop itself; returns the device's name and the bytes in use after it.

    Compiles the kernels of a first prompt, where a backend compiles them. Raises EngineLoadError when no token comes.
    """
    failure = engine.trial(Generate(id=-1, prompt=[0, 0], max_tokens=1))
    if failure is not None:
        raise EngineLoadError(f"the model is loaded, but does not generate: {failure}")
    mx.reset_peak_memory()
    device = mx.default_device()
    name = mx.device_info().get("device_name", "")
    return f"{device.type.name} {name}".strip(), mx.get_active_memory()
