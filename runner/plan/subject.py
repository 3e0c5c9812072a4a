"""One deployment with what its folders say: what the checks look at."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runner.inspect.adapter import AdapterFacts, read_adapter
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.layers import Layers
from runner.inspect.memory import ModelMemory
from runner.inspect.model import ModelFacts, read_model
from runner.manifest.load import Loaded
from runner.manifest.models import Model
from runner.manifest.tree import KeyPath, Problem
from runner.plan.spec import ModelSpec


class Subject(NamedTuple):
    """`facts` is None where the model is not here (yet), and else of the folder as it is; `served` is what the model is
    once it is quantised and cast as the manifest asks. `adapters` and `draft` lack what cannot be read. `layers` are
    there for models with adapters.

    `problems` are those of reading. `settings` are the sections `kv_cache` and `batching`, defaults filled in.
    """

    spec: ModelSpec
    model: Model
    loaded: Loaded
    facts: ModelFacts | None
    served: ModelFacts | None
    adapters: Mapping[str, AdapterFacts]
    draft: ModelFacts | None
    settings: Mapping[str, Mapping[str, Any]]
    layers: Layers | None
    problems: tuple[Problem, ...] = ()

    @property
    def path(self) -> KeyPath:
        """Where it is in the manifest."""
        return ("models", self.spec.name)

    def at(self, section: str, key: str) -> KeyPath:
        """Where a setting is written: with the model, else with the defaults, else the model itself."""
        for path in ((*self.path, section, key), ("defaults", section, key)):
            if path in self.loaded.tree.values:
                return path
        return self.path

    def says(self, section: str, key: str) -> bool:
        """Whether the manifest says it of this model, or of all."""
        return self.settings[section].get(key) is not None

    def source_of(self, *path: str) -> KeyPath:
        """Where the source of an adapter or a draft is written."""
        at = (*self.path, *path)
        return (*at, "source") if (*at, "source") in self.loaded.tree.values else at

    def memory(self, *, float32: bool) -> ModelMemory:
        """What it takes. Without facts, the weights are as the files say, and the rest is not known."""
        limits = self.spec.limits
        if self.served is None:
            return ModelMemory(
                weights=self.spec.weights_bytes,
                rows=limits.max_rows,
                prefix_cache=limits.prefix_cache_bytes,
                exact=False,
            )
        kv = self.settings["kv_cache"]
        allowed = Limits(
            rows=limits.max_rows,
            context=limits.max_context,
            prefill_step=limits.prefill_step_size,
            prefix_cache=limits.prefix_cache_bytes,
            kv_bits=kv.get("bits") or 0,
            kv_group_size=kv.get("group_size") or 64,
            kv_start=kv.get("quantized_start") or 0,
        )
        adapters = list(self.adapters.values())
        return model_memory(
            self.served,
            adapters,
            self.draft,
            allowed,
            float32=float32 and not self.spec.dtype,
            layers=self.layers,
            fused=not float32,
        )


def subject(
    spec: ModelSpec,
    loaded: Loaded,
    absent: Container[Path],
    settings: Mapping[str, Mapping[str, Any]],
    cache: DigestCache,
) -> Subject:
    """Read what a deployment's folders say. Never raises BadFolder: what is wrong is among `problems`."""
    model = loaded.manifest.models[spec.name]
    problems: list[Problem] = []
    path: KeyPath = ("models", spec.name)
    facts = draft = None
    if spec.path not in absent:
        try:
            facts = read_model(spec.path, spec.weights_digest, cache)
        except BadFolder as error:
            problems.append(Problem(error.code, (*path, "source"), error.message, error.hint))
    adapters: dict[str, AdapterFacts] = {}
    for adapter in spec.adapters:
        if adapter.path in absent:
            continue
        try:
            adapters[adapter.name] = cache.derive("adapter", adapter.digest, partial(read_adapter, adapter.path))
        except BadFolder as error:
            at = (*path, "adapters", adapter.name)
            place = (*at, "source") if (*at, "source") in loaded.tree.values else at
            problems.append(Problem(error.code, place, error.message, error.hint))
    if spec.draft is not None and spec.draft.path not in absent:
        try:
            draft = read_model(spec.draft.path, spec.draft.digest, cache)
        except BadFolder as error:
            problems.append(Problem(error.code, (*path, "draft", "source"), error.message, error.hint))
    spec, served = _served(spec, facts)
    layers = None
    if served is not None and adapters:
        with contextlib.suppress(BadFolder):  # it is said of the model
            layers = cache.derive("layers", spec.process_digest, served.linear_layers)
    return Subject(spec, model, loaded, facts, served, adapters, draft, settings, layers, tuple(problems))


def _served(spec: ModelSpec, facts: ModelFacts | None) -> tuple[ModelSpec, ModelFacts | None]:
    """What the engine will see of the model; and the spec, without a quantisation that the source has already."""
    if facts is None or (spec.quantization is None and not spec.dtype):
        return spec, facts
    from runner.plan import quantization  # noqa: PLC0415 - few manifests need it, and every edit waits for imports

    if spec.quantization is not None:
        if any(quantization.check(facts, spec.quantization, ())):
            return spec, facts  # it is said of the model
        spec = replace(spec, quantization=quantization.to_do(facts, spec.quantization))
    served = quantization.served(facts, spec)
    if spec.quantization is not None:
        before = sum(group.nbytes for group in facts.tensors)
        after = sum(group.nbytes for group in served.tensors)
        spec = replace(spec, weights_bytes=spec.weights_bytes - before + after)
    return spec, served


def unclear(it: Subject) -> Iterator[Problem]:
    """Folders that do not say what their memory is."""
    for facts, path in ((it.facts, (*it.path, "source")), (it.draft, (*it.path, "draft", "source"))):
        if facts is None:
            continue
        if facts.layout is None:
            hint = "the model can hardly be loaded so; download or convert it again"
            yield Problem("W608", path, f"its memory cannot be told: {facts.unclear}", hint)
        elif not facts.layout.known:
            message = f"{facts.config.model_type or 'a model without model_type'} is no architecture that is known here"
            yield Problem("W608", path, f"{message}, so what its rows take is a guess", "leave room in memory_limit")
