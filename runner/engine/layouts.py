"""The layout that a model is served with: what is found to be right is left to launches, and to few bits."""

from __future__ import annotations

import logging
from typing import Any, Final

import mlx.core as mx
from msgspec.structs import replace

from runner.engine import attention_block
from runner.engine.compatibility import (
    batches,
    fuses,
    fuses_prompts,
    understood,
    why_not_packed,
    why_not_quantised,
)
from runner.engine.kv import attention_kernel, cosines, prompt_kernel, quantised_kernel, rotary
from runner.engine.kv.calls import Launch
from runner.engine.kv.layout import Layout
from runner.engine.kv.quantised import Quantisation
from runner.errors import EngineLoadError

_EARLY: Final = 3
"""Position from which on rows of a trial are seen packed where there is a threshold: some within the trial."""

logger = logging.getLogger(__name__)


def choose(model: Any, slack: int = 0) -> tuple[Layout, int, bool]:
    """How the model caches, the width of its logits, and whether rows can share a call.

    Launches write and attend at once where there is a device for them and the model lets them. `slack` is how many
    tokens its caches can take back where it has sliding windows.
    """
    launch = attention_kernel.launch()
    if launch is None:
        cosines.install(model)
    layout = Layout(model, slack)
    vocabulary = int(layout.new().call(model, mx.array([[0]])).shape[-1])  # from the shape: nothing is computed
    if launch is not None and not layout.unknown:
        layout = _launching(model, slack, launch, layout, vocabulary)
    if batches(model, layout, vocabulary):
        return layout, vocabulary, True
    return layout if understood(model, layout, vocabulary) else Layout(model, understood=False), vocabulary, False


def _launching(model: Any, slack: int, launch: Launch, plain: Layout, vocabulary: int) -> Layout:
    """The layout that leaves most to launches: the rotation of queries and keys as well, if the model lets it."""
    rotary.install(model)
    if attention_kernel.joined_launch(launch) is not None:
        attention_block.install(model)
    prompt_launch = prompt_kernel.launch()
    for rotates in (True, False):
        fused = Layout(model, slack, launch=launch, rotates=rotates)
        if not fuses(model, fused, plain, vocabulary):
            continue
        wide = Layout(model, slack, launch=launch, prompt_launch=prompt_launch, rotates=rotates)
        return wide if prompt_launch is not None and fuses_prompts(model, wide, plain, vocabulary) else fused
    return plain


def quantised(model: Any, quantisation: Quantisation, plain: Layout, vocabulary: int) -> Layout:
    """How the model caches with `quantisation`; EngineLoadError if it cannot be cached so. `plain` is without it."""
    served = plain.quantised(quantisation)
    # With a threshold, prompts as short as those of a trial would not come to it.
    starts = (0, _EARLY) if quantisation.start else (0,)
    tried = [replace(quantisation, start=start) for start in starts]
    if plain.unknown:
        reason: str | None = f"its caches are of a kind ({', '.join(plain.unknown)}) that is served as it is"
    elif not plain.straight:
        reason = "none of its layers caches all tokens"
    else:
        reason = next(filter(None, (_why_not(model, how, plain, vocabulary) for how in tried)), None)
    if reason is not None:
        hint = "leave bits out, or choose a group_size that divides the width of the model's heads"
        raise EngineLoadError(f"kv_cache.bits: this model's cache cannot be quantised: {reason}", hint=hint)
    if (launch := quantised_kernel.launch()) is None:
        return served
    for how in tried:
        reason = why_not_packed(model, plain.quantised(how, launch), plain.quantised(how), vocabulary)
        if reason is not None:
            logger.warning(f"packed keys take separate operations: {reason}")
            return served
    return plain.quantised(quantisation, launch)


def _why_not(model: Any, how: Quantisation, plain: Layout, vocabulary: int) -> str | None:
    precise = plain.quantised(replace(how, bits=8))
    return why_not_quantised(model, plain.quantised(how), precise, vocabulary)
