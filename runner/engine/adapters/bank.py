"""The resident adapters of one model.

Slots are dense: slot 0 is no adapter, and a freed slot is taken by those above it, so memory is exactly that of the
adapters that are there. `version` tells who holds slot numbers that they have moved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_unflatten

from runner.engine.adapters import mlx_format, peft_format
from runner.engine.adapters.check import AdaptableModules, adaptable_modules, check
from runner.engine.adapters.experts import AdaptedExperts, AdaptedSwitchLinear
from runner.engine.adapters.formats import Adapter, AdapterRefusal, require_folder
from runner.engine.adapters.layers import AdaptedLinear, CurrentSlots, RowSlots
from runner.engine.adapters.sites import Site, Sites
from runner.engine.adapters.stack import Change, Stack
from runner.protocol import AdapterLoaded, AdapterSource


class Resident(msgspec.Struct, eq=False):
    """One adapter in memory. `rows` run with it; once `dropped`, it is freed when the last of them ends.

    `rank` is the largest of a layer, `ranks` are those of the sites, `nbytes` what its own tensors take.
    """

    key: str
    slot: int
    layers: frozenset[str]
    ranks: dict[Site, int]
    rank: int
    nbytes: int
    rows: int = 0
    dropped: bool = False


class AdapterBank:
    """Loads, drops and applies adapters. Everything happens in the engine's main thread, between two steps."""

    def __init__(self, model: Any, dtype: mx.Dtype) -> None:
        """`dtype` is what the model's activations are; adapters are kept in it."""
        self._current = CurrentSlots()
        self.version = 0
        self.generation = 0
        """Changes whenever a layer's stack does."""
        self._model = model
        self._dtype = dtype
        self._modules: AdaptableModules = adaptable_modules(model)
        self._sites = Sites(self._modules.layers)
        self._wrapped: dict[Site, AdaptedLinear | AdaptedSwitchLinear] = {}
        self._blocks: dict[str, AdaptedExperts] = {}
        self._residents: list[Resident] = []
        self._alike: tuple[int, bool] | None = None

    @property
    def keys(self) -> list[str]:
        """Adapters that take new rows."""
        return [resident.key for resident in self._residents if not resident.dropped]

    @property
    def alike(self) -> bool:
        """Whether a call's graph is the same for rows of any one adapter, and of several: all is in kernels then, which
        find each row's slot. Until `generation` changes."""
        if self._alike is None or self._alike[0] != self.generation:
            layers = self._wrapped.values()
            self._alike = self.generation, all(isinstance(one, AdaptedLinear) and one.alike for one in layers)
        return self._alike[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return sum(layer.stack.nbytes for layer in self._wrapped.values() if layer.stack is not None)

    def load(self, source: AdapterSource) -> AdapterLoaded:
        """Make an adapter resident; one that is already is left as it is.

        Raises AdapterRefusal with the reason; nothing has changed then.
        """
        resident = self._find(source.key)
        if resident is None:
            resident = self._add(source.key, read_adapter(Path(source.path), source.scale))
        resident.dropped = False
        return AdapterLoaded(resident.key, len(resident.layers), resident.nbytes, resident.rank)

    def drop(self, key: str) -> None:
        """Take no new rows for `key`; free it now, or when its last row ends."""
        resident = self._find(key)
        if resident is not None:
            resident.dropped = True
            self._free_if_unused(resident)

    def acquire(self, key: str) -> Resident | None:
        """Count a new row of `key`. None when it is not resident."""
        resident = self._find(key)
        if resident is None or resident.dropped:
            return None
        resident.rows += 1
        return resident

    def release(self, resident: Resident) -> None:
        """A row of `resident` has ended."""
        resident.rows -= 1
        assert resident.rows >= 0, "an adapter was released more often than acquired"
        self._free_if_unused(resident)

    def slots(self, rows: Sequence[Resident | None]) -> RowSlots | None:
        """The slots of rows, None when no row has an adapter; valid until `version` changes."""
        numbers = [0 if resident is None else resident.slot for resident in rows]
        if not any(numbers):
            return None
        return RowSlots.of(numbers)

    def apply(self, rows: RowSlots | None) -> None:
        """Let the next model call's rows have these slots."""
        self._current.rows = rows

    def _find(self, key: str) -> Resident | None:
        return next((resident for resident in self._residents if resident.key == key), None)

    def _add(self, key: str, adapter: Adapter) -> Resident:
        layers = check(adapter, self._modules)
        changes = self._sites.changes(layers, self._dtype)
        stacks = {site: self._stack_with(site, changes.get(site)) for site in self._wrapped.keys() | changes.keys()}
        mx.eval([stack.arrays for stack in stacks.values() if stack is not None])
        resident = Resident(
            key=key,
            slot=len(self._residents) + 1,
            layers=frozenset(layers),
            ranks={site: change.rank for site, change in changes.items()},
            rank=max(change.rank for change in layers.values()),
            nbytes=sum((change.a.size + change.b.size) * self._dtype.size for change in layers.values()),
        )
        for site, stack in stacks.items():
            if site not in self._wrapped:
                self._wrapped[site] = self._wrap(site)
            self._wrapped[site].stack = stack
        for layer in self._wrapped.values():
            if isinstance(layer, AdaptedLinear):
                layer.prepare()
        self._residents.append(resident)
        self.generation += 1
        return resident

    def _stack_with(self, site: Site, change: Change | None) -> Stack | None:
        """The site's stack with one more slot, for `change` or, where it is None, for no change."""
        old = self._wrapped[site].stack if site in self._wrapped else None
        if change is None:
            return None if old is None else old.appended_nothing()
        return (old or Stack.empty(len(self._residents) + 1, change)).appended(change)

    def _wrap(self, site: Site) -> AdaptedLinear | AdaptedSwitchLinear:
        if site.joined is not None:
            site.joined.layer = wrapped = AdaptedLinear(site.joined.layer, self._current)
            return wrapped
        (path,) = site.paths
        base = self._modules.layers[path]
        if isinstance(base, nn.Linear | nn.QuantizedLinear):
            linear = AdaptedLinear(base, self._current)
            self._replace(path, linear)
            return linear
        block_path, _, name = path.rpartition(".")
        block = self._blocks.get(block_path)
        if block is None:
            block = self._blocks[block_path] = AdaptedExperts(self._modules.blocks[block_path], self._current)
            self._replace(block_path, block)
        experts = AdaptedSwitchLinear(base, block.routed)
        setattr(block.base, name, experts)
        return experts

    def _replace(self, path: str, module: nn.Module) -> None:
        self._model.update_modules(tree_unflatten([(path, module)]))

    def _free_if_unused(self, resident: Resident) -> None:
        if not resident.dropped or resident.rows or resident not in self._residents:
            return
        self._residents.remove(resident)
        for site, layer in self._wrapped.items():
            if layer.stack is not None:
                ranks = [r.ranks[site] for r in self._residents if site in r.ranks]
                layer.stack = layer.stack.without(resident.slot, max(ranks)) if ranks else None
        for other in self._residents:
            other.slot -= other.slot > resident.slot
        mx.eval([layer.stack.arrays for layer in self._wrapped.values() if layer.stack is not None])
        self.version += 1
        self.generation += 1


def read_adapter(folder: Path, scale: float | None) -> Adapter:
    """The adapter in a folder of either format; `scale` replaces its own. Raises AdapterRefusal."""
    require_folder(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterRefusal(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterRefusal(f"{folder / 'adapter_config.json'} is not an object")
    read = peft_format.read if "peft_type" in config else mlx_format.read
    return read(folder, config, scale)
