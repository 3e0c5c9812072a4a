"""Specs by hand and by hypothesis, for tests of the planner and of what prints its plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from runner.plan.forecast import ENGINE_BYTES
from runner.plan.planner import Observed
from runner.plan.spec import AdapterSpec, Desired, EngineLimits, ListenerSpec, ModelSpec

GIB = 2**30
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that have other things to do."""


def adapter(name: str, digest: str = "d1") -> AdapterSpec:
    return AdapterSpec(name, Path("/adapters") / name, f"{name}-{digest}")


def model(name: str = "chat", weights: str = "w1", size: int = GIB, **fields: object) -> ModelSpec:
    """`size` is what its engine takes, process and all."""
    base = ModelSpec(name, f"./{name}", Path("/models") / name, weights, size - ENGINE_BYTES)
    return replace(base, **fields)  # type: ignore[arg-type]


def listener(name: str = "lm", port: int = 8080, **fields: object) -> ListenerSpec:
    return replace(ListenerSpec(name, "127.0.0.1", port, ("chat",)), **fields)  # type: ignore[arg-type]


def desired(*models: ModelSpec, listeners: tuple[ListenerSpec, ...] = (listener(),), limit: int = 0) -> Desired:
    return Desired("dev", models, listeners, limit)


def observed(*models: ModelSpec, listeners: tuple[ListenerSpec, ...] = (listener(),)) -> Observed:
    return Observed(models, listeners, memory_bytes=16 * GIB)


_names = st.sampled_from(["a", "b", "c", "d"])
_sizes = {"w1": 1, "w2": 2, "w3": 5}
_models = st.builds(
    lambda name, weights, adapters, rows, aliases: model(
        name,
        weights,
        _sizes[weights] * GIB,
        adapters=tuple(adapter(x) for x in sorted(adapters)),
        limits=EngineLimits(max_rows=rows),
        aliases=tuple(sorted(aliases)),
    ),
    _names,
    st.sampled_from(sorted(_sizes)),
    st.sets(_names),
    st.integers(1, 2),
    st.sets(st.sampled_from(["x", "y"])),
)
_listeners = st.builds(
    lambda name, port, host, keys: listener(name, port, host=host, api_keys=keys),
    _names,
    st.integers(8080, 8082),
    st.sampled_from(["127.0.0.1", "127.0.0.2"]),
    st.sampled_from([(), ("s3cret-1",), ("s3cret-2", "s3cret-3")]),
)
states = st.dictionaries(_names, _models).map(lambda d: tuple(replace(m, name=n) for n, m in d.items()))
ports = st.dictionaries(_names, _listeners).map(lambda d: tuple(replace(s, name=n) for n, s in d.items()))
