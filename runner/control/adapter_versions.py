"""Which version of an adapter a request gets: the one that is current when its row begins."""

from __future__ import annotations

import msgspec

from runner.errors import NotServed
from runner.plan.spec import ModelSpec
from runner.protocol import Generate


class AdapterVersions:
    """Remembers the names of all adapter keys that a deployment has served: a request has the key of its time."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def remember(self, spec: ModelSpec) -> None:
        """Note the adapters of `spec`."""
        self._names.update({a.key: a.name for a in spec.adapters})

    def current(self, request: Generate, spec: ModelSpec) -> Generate:
        """`request` for the version that `spec` has: it was routed before an edit, maybe, and has no row yet. Raises
        NotServed where the adapter is gone."""
        if not request.adapter or any(a.key == request.adapter for a in spec.adapters):
            return request
        name = self._names.get(request.adapter, request.adapter)
        adapter = spec.adapter(name)
        if adapter is None:
            raise NotServed(
                f"the model {spec.name!r} has no adapter {name!r}", param="adapter_name", code="adapter_not_found"
            )
        return msgspec.structs.replace(request, adapter=adapter.key)
