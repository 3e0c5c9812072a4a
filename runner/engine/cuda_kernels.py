"""Whether kernels that are written for CUDA can be used in this process."""

from __future__ import annotations

import os
from functools import cache

import mlx.core as mx


@cache
def usable(switch: str) -> bool:
    """On a CUDA device that MLX computes on, unless the environment variable `switch` is 0."""
    return os.environ.get(switch) != "0" and bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)


def terse(source: str) -> str:
    """A kernel's text without what only readers need: MLX copies and hashes it in each call."""
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))
