"""Quantisation on the way into memory: from the manifest's section to a spec, what is wrong with it, and what the model
then is. Imported only where a manifest asks for it: every edit waits for imports."""

from __future__ import annotations

from collections.abc import Iterator

from runner.inspect import quantize
from runner.inspect.config import Packing
from runner.inspect.model import ModelFacts
from runner.manifest.quantization import LayerQuantization, Quantization
from runner.manifest.tree import KeyPath, Problem
from runner.plan.spec import ModelSpec, QuantizationSpec


def quantization_spec(section: Quantization) -> QuantizationSpec:
    """With what mlx_lm.convert takes where the section says nothing, and what a rule leaves out as for all layers."""
    packing = quantize.packing_of(section.bits, section.group_size, section.mode)
    rules = {
        pattern: False if rule is None else _rule(rule, packing)._asdict() for pattern, rule in section.layers.items()
    }
    return QuantizationSpec(packing.bits, packing.group_size, packing.mode, rules)


def _rule(rule: LayerQuantization, packing: Packing) -> Packing:
    if rule.mode is not None and rule.mode != packing.mode:
        return quantize.packing_of(rule.bits, rule.group_size, rule.mode)
    return Packing(rule.bits or packing.bits, rule.group_size or packing.group_size, packing.mode)


def _wanted(spec: QuantizationSpec) -> quantize.Wanted:
    layers = {pattern: Packing(**rule) if isinstance(rule, dict) else None for pattern, rule in spec.layers.items()}
    return quantize.Wanted(Packing(spec.bits, spec.group_size, spec.mode), layers)


def check(facts: ModelFacts, spec: QuantizationSpec, at: KeyPath) -> Iterator[Problem]:
    """What the source cannot be turned into; `at` is the place of the section."""
    found = quantize.misfit(facts, _wanted(spec))
    if found is not None:
        yield Problem("E609", (*at, *found.keys), found.message, found.hint, at_key=not found.keys)


def to_do(facts: ModelFacts, spec: QuantizationSpec) -> QuantizationSpec | None:
    """None where the source is quantised in just this way already."""
    return None if quantize.is_already(facts, _wanted(spec)) else spec


def served(facts: ModelFacts, spec: ModelSpec) -> ModelFacts:
    """What the engine gets to see of a model with these facts."""
    if spec.quantization is None:
        return quantize.cast(facts, spec.dtype) if spec.dtype else facts
    dtype = quantize.converted_dtype(facts.config, spec.dtype)
    return quantize.quantized(quantize.cast(facts, dtype) if dtype else facts, _wanted(spec.quantization))
