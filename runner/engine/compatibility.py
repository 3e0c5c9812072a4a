"""Whether a model computes the same for a row in a batch as for the row alone.

Upstream's models are written one by one, and a few get batches with padding wrong, silently. So every model is tried
when it is loaded: three short rows together, padded as the loop pads them, against each alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from runner.engine.arrays import to_list
from runner.errors import EngineLoadError

logger = logging.getLogger(__name__)

_LENGTHS: Final = (5, 2, 3)
_TOLERANCE: Final = 0.25
"""Relative error of a row's logits. Low-precision kernels that differ by batch size stay below a tenth of it; rows that
see each other's padding are well above."""


def require_batching(caches: list[Any], name: str) -> None:
    """Raises EngineLoadError for a model whose caches cannot hold several rows at all."""
    for cache in _leaves(caches):
        if not hasattr(cache, "merge"):
            raise EngineLoadError(
                f"{name} cannot be served: its cache ({type(cache).__name__}) does not hold several requests"
            )


def batches(model: Any, new_cache: Callable[[], list[Any]], vocabulary: int) -> bool:
    """Whether rows of different lengths can share a model call. Raises what the model raises for a single row."""
    prompts = [[(7 * row + token) % vocabulary for token in range(length)] for row, length in enumerate(_LENGTHS)]
    alone = mx.stack([model(mx.array([prompt]), cache=new_cache())[0, -1] for prompt in prompts])
    mx.eval(alone)
    try:
        error = max(to_list(_relative_error(_together(model, new_cache, prompts), alone)))
    except (ValueError, RuntimeError, TypeError, AttributeError) as failure:
        logger.warning("model does not batch", extra={"reason": str(failure)})
        return False
    if not error <= _TOLERANCE:
        logger.warning("model does not batch", extra={"relative_error": round(error, 3)})
        return False
    return True


def _together(model: Any, new_cache: Callable[[], list[Any]], prompts: list[list[int]]) -> mx.array:
    """[rows, vocabulary]: last logits, all but the last tokens prefilled together and the last ones decoded."""
    caches = [layer[0].merge(list(layer)) for layer in zip(*(new_cache() for _ in prompts), strict=True)]
    lengths = [len(prompt) - 1 for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    model(mx.array([prompt[:-1] + [0] * pad for prompt, pad in zip(prompts, padding, strict=True)]), cache=caches)
    for cache in caches:
        cache.finalize()
    logits: mx.array = model(mx.array([[prompt[-1]] for prompt in prompts]), cache=caches)
    return logits[:, -1]


def _relative_error(found: mx.array, expected: mx.array) -> mx.array:
    """[rows]: against the spread of the expected logits."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    spread = expected - mx.mean(expected, axis=-1, keepdims=True)
    return mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(spread, axis=-1)


def _leaves(caches: list[Any]) -> list[Any]:
    return [leaf for c in caches for leaf in (_leaves(list(c.caches)) if isinstance(c, CacheList) else [c])]
