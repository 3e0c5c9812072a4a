"""Where the changes of an adapter take effect: at a layer, or at the product of several that are computed as one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec

from runner.engine.adapters.formats import AdapterRefusal, LowRank
from runner.engine.adapters.stack import Change, Span
from runner.engine.arrays import to_list
from runner.engine.joined import JoinedLayers, joined_of


class Site(msgspec.Struct, frozen=True, eq=False):
    """`paths` are the layers that are computed here, in the order of their outputs; one, unless `joined`."""

    paths: tuple[str, ...]
    joined: JoinedLayers | None


class Sites:
    """Maps a model's layers to sites. To be built before any layer is wrapped."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        """`layers` by their paths."""
        self._layers = layers
        groups: dict[int, tuple[JoinedLayers, dict[int, str]]] = {}
        self._sites: dict[str, Site] = {}
        for path, layer in layers.items():
            if (found := joined_of(layer)) is None:
                self._sites[path] = Site((path,), None)
            else:
                groups.setdefault(id(found[0]), (found[0], {}))[1][found[1]] = path
        for joined, paths in groups.values():
            site = Site(tuple(paths[index] for index in range(len(joined.outputs))), joined)
            self._sites.update(dict.fromkeys(site.paths, site))

    def changes(self, layers: Mapping[str, LowRank], dtype: mx.Dtype) -> dict[Site, Change]:
        """An adapter's changes by site, in `dtype`. Raises AdapterRefusal: too large for that."""
        changes = {path: self._change(path, change, dtype) for path, change in layers.items()}
        _require_finite(changes)
        by_site: dict[Site, dict[str, Change]] = {}
        for path, change in changes.items():
            by_site.setdefault(self._sites[path], {})[path] = change
        return {
            site: parts[site.paths[0]] if site.joined is None else _join(site, parts) for site, parts in by_site.items()
        }

    def _change(self, path: str, change: LowRank, dtype: mx.Dtype) -> Change:
        factor = None
        if change.magnitude is not None:
            factor = (change.magnitude / _adapted_norms(self._layers[path], change)).astype(dtype)
        spans = ((int(change.b.shape[-1]), 0, change.rank),)
        return Change(change.a.astype(dtype), change.b.astype(dtype), factor, spans)


def _require_finite(changes: Mapping[str, Change]) -> None:
    """Rows of other adapters are multiplied by these as well, by zeros (`mixed.py`), which would be no numbers."""
    names = "lora_a", "lora_b, times its scale,"
    # 0 unless there is a value that times 0 is none. In few operations: rows that decode wait for an adapter.
    left = [mx.sum(0 * matrix) for change in changes.values() for matrix in (change.a, change.b)]
    for (path, name), value in zip(product(changes, names), to_list(mx.stack(left)), strict=True):
        if value != 0:
            dtype = str(changes[path].b.dtype).rpartition(".")[2]
            raise AdapterRefusal(f"{path}: {name} holds a value that is not finite in {dtype}, the model's type")


def _join(site: Site, parts: Mapping[str, Change]) -> Change:
    """One change for layers that are computed as one: ranks side by side, and each part's `b` in its own columns."""
    assert site.joined is not None
    known = [parts[path] for path in site.paths if path in parts]
    rank, dtype = sum(change.rank for change in known), known[0].b.dtype
    columns: list[mx.array] = []
    factors: list[mx.array] = []
    spans: list[Span] = []
    end = low = 0
    for path, outputs in zip(site.paths, site.joined.outputs, strict=True):
        change = parts.get(path)
        high = low if change is None else low + change.rank
        b, factor = mx.zeros((rank, outputs), dtype), mx.ones((outputs,), dtype)
        if change is not None:
            b[low:high] = change.b
            factor = factor if change.factor is None else change.factor
        columns.append(b)
        factors.append(factor)
        end += outputs
        spans.append((end, low, high))
        low = high
    return Change(
        mx.concatenate([change.a for change in known], axis=1),
        mx.concatenate(columns, axis=1),
        mx.concatenate(factors) if any(change.factor is not None for change in known) else None,
        tuple(spans),
    )


def _adapted_norms(base: Any, change: LowRank) -> mx.array:
    """[out]: norms of the adapted weight's rows, which DoRA divides by (Liu et al., arXiv:2402.09353)."""
    weight = base.weight
    if isinstance(base, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight, base.scales, base.get("biases"), group_size=base.group_size, bits=base.bits, mode=base.mode
        )
    adapted = weight.astype(mx.float32) + (change.a @ change.b).T
    return mx.linalg.norm(adapted, axis=1)
