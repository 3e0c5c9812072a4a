"""Whether kernels that are written for CUDA can be used in this process."""

from __future__ import annotations

import os
from functools import cache

import mlx.core as mx


@cache
def usable(switch: str) -> bool:
    """On a CUDA device that MLX computes on, unless the environment variable `switch` is 0."""
    return os.environ.get(switch) != "0" and bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)
