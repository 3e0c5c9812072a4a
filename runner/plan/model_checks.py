"""What a schema cannot say of a deployment: whether its parts fit each other, and what would silently not be done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runner.inspect import fit
from runner.inspect.estimate import longest_context
from runner.inspect.files import DigestCache
from runner.inspect.served import is_known_to_mlx_lm, is_served_alone, takes_quantised_cache
from runner.manifest.tree import KeyPath, Problem
from runner.plan.code_checks import check_code
from runner.plan.draft_checks import check_draft
from runner.plan.subject import Subject, unclear

_KV_GROUPS: Final = (128, 64, 32)


def check_model(it: Subject, cache: DigestCache) -> Iterator[Problem]:
    """Everything about one deployment but its memory."""
    yield from it.problems
    yield from check_code(it, cache)
    if it.facts is None:
        return
    if not is_known_to_mlx_lm(it.facts.config):
        kind = it.facts.config.model_type
        message = f"{kind} is no architecture that mlx_lm has" if kind else "config.json has no model_type"
        yield Problem("E611", (*it.path, "source"), message, "take a text model that mlx_lm can run")
        return
    yield from unclear(it)
    yield from _adapters(it)
    yield from check_draft(it, cache)
    yield from _quantization(it)
    yield from _kv_cache(it)
    yield from _context(it)
    yield from _silently_less(it)


def _adapters(it: Subject) -> Iterator[Problem]:
    for name, adapter in it.adapters.items():
        path = it.source_of("adapters", name)
        entry = it.model.adapters.get(name)
        if adapter.no_scale and (entry is None or entry.scale is None):
            short = path[-1] == name and entry is not None
            hint = f"write {name}: {{source: {entry.source}, scale: 20}}" if short and entry else "give scale: here"
            yield Problem("E606", path, adapter.no_scale, hint)
        if it.layers is not None and (why := fit.misfit(adapter, it.layers)):
            hint = f"it was trained on {adapter.base}" if adapter.base else "give an adapter that was trained on it"
            code, verb = ("E607", "does not") if it.layers.certain else ("W606", "may not")
            yield Problem(code, path, f"{verb} fit models.{it.spec.name}: {why}", hint)


def _quantization(it: Subject) -> Iterator[Problem]:
    if it.spec.quantization is None or it.facts is None:
        return
    from runner.plan.quantization import check  # noqa: PLC0415 - few manifests need it, and every edit waits for imports

    yield from check(it.facts, it.spec.quantization, (*it.path, "quantization"))


def _kv_cache(it: Subject) -> Iterator[Problem]:
    yield from _idle_kv_settings(it)
    bits = it.settings["kv_cache"].get("bits")
    if not bits or it.facts is None or (layout := it.facts.layout) is None:
        return
    if not layout.head_dims or not takes_quantised_cache(it.facts.config):
        path = it.at("kv_cache", "bits")
        why = "has no layer that keeps all tokens: there is nothing to quantise"
        if layout.head_dims:
            why = "computes with a cache of its own kind, which cannot be quantised"
        yield Problem("E610", path, f"{_whose(it, path)}{it.facts.config.model_type} {why}", _without_bits(it, path))
        return
    size = it.settings["kv_cache"].get("group_size") or 64
    odd = [dim for dim in layout.head_dims if dim % size]
    if odd:
        fitting = [group for group in _KV_GROUPS if not any(dim % group for dim in layout.head_dims)]
        path = it.at("kv_cache", "group_size" if it.says("kv_cache", "group_size") else "bits")
        message = f"{_whose(it, path)}the heads are {odd[0]} wide, which groups of {size} do not divide"
        hint = f"give group_size: {fitting[0]}" if fitting else _without_bits(it, path)
        yield Problem("E610", path, message, hint)


def _idle_kv_settings(it: Subject) -> Iterator[Problem]:
    """What changes nothing, of what the model's own section says of a quantised cache."""
    assert it.facts is not None
    settings = it.settings["kv_cache"]
    for key in ("group_size", "quantized_start"):
        path = it.at("kv_cache", key)
        if settings.get(key) and not settings.get("bits") and not _whose(it, path):
            yield Problem("W615", path, "changes nothing without bits: the cache is not quantised", "give bits: 8")
    start = settings.get("quantized_start") or 0
    longest = longest_context(it.facts, it.spec.limits.max_context)
    path = it.at("kv_cache", "quantized_start")
    if settings.get("bits") and 0 < longest <= start and not _whose(it, path):
        message = f"is {start}, but no request has more than {longest} tokens: nothing is quantised"
        yield Problem("W615", path, message, f"give less than {longest}, or leave bits out")


def _whose(it: Subject, path: KeyPath) -> str:
    """The model's name, for a place that is not the model's own."""
    return "" if path[: len(it.path)] == it.path else f"models.{it.spec.name}: "


def _without_bits(it: Subject, path: KeyPath) -> str:
    return "leave bits out" if not _whose(it, path) else "give bits to the other models, and leave them out here"


def _context(it: Subject) -> Iterator[Problem]:
    assert it.facts is not None
    own, wanted = it.facts.config.max_context, it.spec.limits.max_context
    if own and wanted > own:
        path = it.at("kv_cache", "max_context")
        if _whose(it, path):
            return  # a default is for models of all kinds
        message = f"is {wanted}, but the model is made for {own} tokens: longer requests are refused all the same"
        yield Problem("W603", path, message, f"give {own} or less")


def _silently_less(it: Subject) -> Iterator[Problem]:
    """Combinations that work, and do less than they seem to."""
    assert it.facts is not None
    several = it.says("batching", "max_rows") and it.spec.limits.max_rows > 1
    if several and is_served_alone(it.facts.config):
        message = f"{it.facts.config.model_type} models do not batch: requests are answered one at a time"
        yield Problem("W604", it.at("batching", "max_rows"), message, "give 1, or take another model for many users")
    layout = it.facts.layout
    if layout is not None and layout.recurrent and it.settings["kv_cache"].get("prefix_cache"):
        message = (
            "the model keeps states, which cannot be cut back: only prompts that go on from all of an earlier one "
        )
        hint = "lower it where prompts only begin alike"
        yield Problem("W605", it.at("kv_cache", "prefix_cache"), message + "start sooner", hint)
