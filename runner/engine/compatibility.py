"""Whether a model computes the same for a row in a batch as for the row alone.

Upstream's models are written one by one, and a few get batches with padding wrong, silently. So every model is tried
when it is loaded: three short rows together, padded as the loop pads them, against each alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx

from runner.engine.arrays import to_list
from runner.engine.kv.layout import Layout

logger = logging.getLogger(__name__)

_LENGTHS: Final = (5, 2, 3)
_BEFORE: Final = (4, 1)
_LONG: Final = (90, 50)
"""Tokens of two rows, and how many of them come first: a wide call then goes on with rows of different lengths."""

_TOLERANCE: Final = 0.25
"""Relative error of a row's logits. Low-precision kernels that differ by batch size stay below a tenth of it; rows that
see each other's padding are well above."""

_FAILURES: Final = (ValueError, RuntimeError, TypeError, AttributeError)


def batches(model: Any, layout: Layout, vocabulary: int) -> bool:
    """Whether rows of different lengths can share a model call. Raises what the model raises for a single row."""
    if layout.unknown:
        return False
    prompts = _prompts(vocabulary)
    expected = _alone(model, layout, prompts)
    try:
        error = _error(model, layout, prompts, expected)
    except _FAILURES as failure:
        logger.warning("model does not batch", extra={"reason": str(failure)})
        return False
    if not error <= _TOLERANCE:
        logger.warning("model does not batch", extra={"relative_error": round(error, 3)})
        return False
    return True


def understood(model: Any, layout: Layout, vocabulary: int) -> bool:
    """Whether a row by itself comes out of our caches as it does out of upstream's."""
    prompt = [token % vocabulary for token in range(_LENGTHS[0])]
    expected = _alone(model, layout, [prompt])
    try:
        return _error(model, layout, [prompt], expected) <= _TOLERANCE
    except _FAILURES:
        return False


def fuses(model: Any, layout: Layout, plain: Layout, vocabulary: int) -> bool:
    """Whether rows come out of `layout`, which writes and attends in one launch, as they do out of the `plain` one.

    They do not where a model uses its keys itself, and where there is no kernel for it that compiles.
    """
    prompts = _prompts(vocabulary)
    cases = [(rows, None) for rows in (prompts, prompts[:1], prompts[:1] * 2)]
    return _same(model, layout, plain, cases, "attention takes separate operations")


def fuses_prompts(model: Any, layout: Layout, plain: Layout, vocabulary: int) -> bool:
    """The same for wide calls, which `layout` has other launches for."""
    cases = [(_prompts(vocabulary, _LONG), _BEFORE)]
    return _same(model, layout, plain, cases, "prompts' attention takes separate operations")


def _same(
    model: Any,
    layout: Layout,
    plain: Layout,
    cases: Sequence[tuple[list[list[int]], Sequence[int] | None]],
    otherwise: str,
) -> bool:
    """Whether rows come out of both, which is logged where not; a case is prompts and what is called of them before."""
    try:
        error = max(
            _error(model, layout, rows, _together(model, plain, rows, before), before) for rows, before in cases
        )
    except _FAILURES as failure:
        logger.warning(otherwise, extra={"reason": str(failure)})
        return False
    if not error <= _TOLERANCE:
        logger.warning(otherwise, extra={"relative_error": round(error, 3)})
        return False
    return True


def why_not_quantised(model: Any, layout: Layout, precise: Layout, vocabulary: int) -> str | None:
    """Why rows cannot be kept as `layout` quantises them, or None.

    `precise` does so in as many bits as should change little: few bits may change much, and are wanted all the same.
    """
    prompts = _prompts(vocabulary)
    try:
        alone = mx.stack([_together(model, layout, [prompt])[0] for prompt in prompts])
        if (error := _error(model, layout, prompts, alone)) > _TOLERANCE:
            return f"rows in a batch are {error:.0%} off what they are alone"
        if (error := _error(model, precise, prompts, _alone(model, layout, prompts))) > _TOLERANCE:
            return f"in 8 bits it is {error:.0%} off"
    except _FAILURES as failure:
        return str(failure)
    return None


def why_not_packed(model: Any, launched: Layout, apart: Layout, vocabulary: int) -> str | None:
    """Why rows cannot be left to `launched`, which packs, writes and attends in one launch, or None.

    It is judged by what the model says without quantisation, and may be a little further from that than `apart` is,
    which does the same in separate operations. So nothing is compiled but what is used then.
    """
    prompts = _prompts(vocabulary)
    expected = _alone(model, apart, prompts)
    try:
        allowed = _error(model, apart, prompts, expected) + _TOLERANCE
        error = max(_error(model, launched, rows, expected[: len(rows)]) for rows in (prompts, prompts[:1]))
    except _FAILURES as failure:
        return str(failure)
    return None if error <= allowed else f"{error:.0%} off what the model says, where {allowed:.0%} would do"


def _prompts(vocabulary: int, lengths: Sequence[int] = _LENGTHS) -> list[list[int]]:
    return [[(7 * row + token) % vocabulary for token in range(length)] for row, length in enumerate(lengths)]


def _alone(model: Any, layout: Layout, prompts: list[list[int]]) -> mx.array:
    """[rows, vocabulary]: last logits of each prompt in upstream's caches."""
    return mx.stack([_computed(model(mx.array([prompt]), cache=layout.upstream())[0, -1]) for prompt in prompts])


def _computed(logits: mx.array) -> mx.array:
    """The same, computed: calls that do not need each other's results could run at once on a device, and their blocks
    leave something for each other at the same places then (`cuda_kernels.room`, `exchange`)."""
    mx.eval(logits)
    return logits


def _error(
    model: Any, layout: Layout, prompts: list[list[int]], expected: mx.array, before: Sequence[int] | None = None
) -> float:
    errors: list[float] = to_list(_relative_error(_together(model, layout, prompts, before), expected))
    return max(errors)


def _together(model: Any, layout: Layout, prompts: list[list[int]], before: Sequence[int] | None = None) -> mx.array:
    """[rows, vocabulary]: last logits, all but the last tokens prefilled together and the last ones decoded.

    The first `before` of them are prefilled in a call of their own.
    """
    caches = layout.new(len(prompts))
    starts: Sequence[int] = [0] * len(prompts)
    for ends in (before, [len(prompt) - 1 for prompt in prompts]):
        if ends is not None:
            parts = [prompt[i:j] for prompt, i, j in zip(prompts, starts, ends, strict=True)]
            lengths = [len(part) for part in parts]
            caches.call(model, mx.array([part + [0] * (max(lengths) - len(part)) for part in parts]), lengths)
            # Of the next call a layer needs the same layer of this one, and no other: see `_computed`.
            mx.eval(caches.arrays)
            starts = ends
    return _computed(caches.call(model, mx.array([[prompt[-1]] for prompt in prompts]))[:, -1])


def _relative_error(found: mx.array, expected: mx.array) -> mx.array:
    """[rows]: against the spread of the expected logits."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    spread = expected - mx.mean(expected, axis=-1, keepdims=True)
    return mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(spread, axis=-1)
