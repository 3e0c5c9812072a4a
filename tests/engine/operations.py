"""What a graph consists of, and how arrays lie."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import mlx.core as mx

from runner.engine.kv.calls import Call, Planes

VIEWS = {"Reshape", "Transpose", "Slice", "Broadcast", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "AsStrided"}
VIEWS |= {"View"}


def operations(scratch: Path, *arrays: mx.array) -> Counter[str]:
    """Of what is not computed yet of some arrays, but for views."""
    whole = with_views(scratch, *arrays)
    return Counter({label: count for label, count in whole.items() if label not in VIEWS})


def with_views(scratch: Path, *arrays: mx.array) -> Counter[str]:
    """The same with them."""
    mx.export_to_dot(str(scratch / "graph.dot"), *arrays)  # type: ignore[attr-defined]
    return Counter(re.findall(r'label ?= ?"(\w+)", shape=rectangle', (scratch / "graph.dot").read_text()))


def strides(array: mx.array) -> tuple[int, ...]:
    """In bytes."""
    found = memoryview(array).strides  # type: ignore[arg-type]  # it has a buffer
    assert found is not None
    return found


def one(call: Call) -> tuple[mx.array, Planes]:
    """A launch that is one operation, and writes nothing."""
    (attended,) = mx.depends([call.queries], [call.keys, call.values, *call.planes, call.starts])
    return attended, call.planes
