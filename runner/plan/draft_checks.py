"""Whether a draft model can propose for its model, by the engine's rules (`runner.engine.speculative.loading`)."""

from __future__ import annotations

from collections.abc import Iterator

from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.served import is_served_alone
from runner.manifest.tree import Problem
from runner.manifest.values import format_size
from runner.plan.subject import Subject


def check_draft(it: Subject, cache: DigestCache) -> Iterator[Problem]:
    """Everything about the draft of one deployment."""
    if it.spec.draft is None or it.draft is None or it.facts is None:
        return
    yield from _vocabulary(it, cache)
    yield from _no_speculation(it)
    yield from _hardly_pays(it)


def _vocabulary(it: Subject, cache: DigestCache) -> Iterator[Problem]:
    # Imported here: few manifests have drafts, and every edit waits for imports.
    from runner.inspect.tokenizer import compare_vocabularies  # noqa: PLC0415

    assert it.spec.draft is not None
    path, model = it.source_of("draft"), f"models.{it.spec.name}"
    try:
        found = compare_vocabularies(it.spec.path, it.spec.draft.path, cache)
    except BadFolder as error:
        yield Problem(error.code, path, error.message, error.hint)
        return
    hint = "a draft is a smaller model of the same family, with the same tokenizer"
    if found is None:
        message = "its vocabulary cannot be compared with the model's: one of them has no tokenizer.json"
        yield Problem("W607", path, message, hint)
        return
    if found.different or not found.alike:
        message = (
            f"{found.different} of the {found.wanted} tokens of {model} are not the same in the draft's {found.has}"
        )
        example = f", such as {found.example!r}" if found.example else ""
        yield Problem("W607" if found.alike else "E608", path, message + example, hint)
    if found.ends is not None:
        here, there = found.ends
        message = f"a text ends with {there!r} for the draft, and with {here!r} for {model}"
        yield Problem("W607", path, message, "what it proposes for the end of an answer is never taken")


def _no_speculation(it: Subject) -> Iterator[Problem]:
    """What makes the engine leave the draft out: tokens that are refused have to be taken back."""
    assert it.facts is not None
    assert it.draft is not None
    for role, facts in (("the model", it.facts), ("the draft", it.draft)):
        if facts.layout is not None and facts.layout.recurrent:
            why = f"{role} ({facts.config.model_type}) keeps states, which cannot be cut back"
            yield Problem("W609", it.source_of("draft"), f"there will be no speculation: {why}", "remove draft")
            return
    if is_served_alone(it.draft.config):
        why = f"the draft ({it.draft.config.model_type}) does not batch"
        yield Problem("W609", it.source_of("draft"), f"there will be no speculation: {why}", "take another draft")


def _hardly_pays(it: Subject) -> Iterator[Problem]:
    assert it.facts is not None
    assert it.draft is not None
    if it.spec.default_adapter is not None:
        message = "the draft proposes for the plain model, so fewer of its tokens are taken with an adapter"
        yield Problem("W609", (*it.path, "default_adapter"), message, "measure whether the draft still pays")
    draft, model = (sum(group.nbytes for group in facts.tensors) for facts in (it.draft, it.facts))
    if draft >= model > 0:
        message = f"the draft ({format_size(draft)}) is not smaller than the model ({format_size(model)})"
        yield Problem("W609", it.source_of("draft"), message, "are the two the wrong way round?")
