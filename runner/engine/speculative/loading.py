"""A draft model beside its target: loaded, checked against it, and both of them timed."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.loader import LoadedModel, load
from runner.engine.memory import cache_bytes_per_token
from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.lean import lean
from runner.engine.speculative.proposer import Proposer
from runner.engine.speculative.speculation import Speculation
from runner.engine.tokenizer import Tokenizer
from runner.engine.traced import TracedCalls
from runner.errors import EngineLoadError

SLACK: Final = 16
"""Proposals that a model with sliding windows has room for at least, so that the number can be changed in place."""

_LARGE: Final = 32
"""Tokens in a call that shows what computing costs, where a small one shows what reading the weights does."""

_SHAPES: Final = ((1, 1), (8, 1), (4, 8), (5, 8), (8, 8))
"""Rows, and tokens of each, of calls that are timed where graphs are kept. Beyond 32 tokens products are others."""

_READ: Final = ((32, 2), (32, 16), (32, 64))
"""Rows, and tokens of each, that a draft reads to see what that costs: nothing of it is kept as a graph."""

_WARM: Final = 5
_COUNTED: Final = 7
"""Calls that are not counted, until the graph is kept and the device knows it, and those that are."""

_ALIKE: Final = 0.99
"""Share of the target's tokens that the draft's tokenizer has to have under the same number. Of one family, a few
special ones may differ."""


def slack_for(num_draft_tokens: int) -> int:
    """Tokens that caches with windows should be able to take back."""
    return max(num_draft_tokens, SLACK)


def speculate(
    folder: Path, target: LoadedModel, slack: int, *, trust_remote_code: bool = False
) -> tuple[Speculation | None, list[str]]:
    """Speculation for a target with the draft model in `folder`, or None and a note why there can be none.

    Both models' caches take back `slack` tokens; `trust_remote_code` is of the draft. Raises EngineLoadError: the draft
    cannot be loaded, or its tokenizer is another one.
    """
    draft = load_draft(folder, target, slack, trust_remote_code=trust_remote_code)
    reason = refusal(target, draft)
    if reason is not None:
        return None, [f"no speculation: {reason}"]
    return start_speculation(target, draft, slack), [f"draft: {note}" for note in draft.notes]


def load_draft(folder: Path, target: LoadedModel, slack: int, *, trust_remote_code: bool = False) -> LoadedModel:
    """The draft model, for a target. Raises EngineLoadError as `speculate` does."""
    try:
        draft = load(folder, slack=slack, trust_remote_code=trust_remote_code)
    except EngineLoadError as error:
        raise EngineLoadError(f"draft {folder}: {error.message}", hint=error.hint) from error
    _require_same_tokens(folder, draft.tokenizer, target.tokenizer)
    return lean(draft, slack)


def refusal(target: LoadedModel, draft: LoadedModel) -> str | None:
    """Why the two cannot speculate, or None: tokens that are refused have to be taken back."""
    for role, model in (("the model", target), ("the draft", draft)):
        if not model.layout.trimmable:
            return f"{role} ({model.architecture}) keeps a state from which no token can be taken back"
    return None if draft.batches else f"the draft ({draft.architecture}) does not batch"


def start_speculation(target: LoadedModel, draft: LoadedModel, slack: int) -> Speculation:
    """Speculation with the two; times a few calls of each, which also compiles their kernels."""
    costs = Costs(timed(target), timed(draft), None if draft.layout.launch is None else reading(draft))
    windows = target.layout.windows or draft.layout.windows
    proposer = Proposer(draft.model, draft.layout, draft.vocabulary, target.vocabulary)
    token_bytes = cache_bytes_per_token(draft.model, draft.layout)
    return Speculation(proposer, costs, slack if windows else None, draft.weights_bytes, token_bytes)


def timed(loaded: LoadedModel) -> Curve:
    """What calls of a model cost. On a GPU the first of a size compiles kernels, and does not count."""
    if loaded.layout.launch is not None:
        # Steps whose graphs are kept cost much less than the first of their kind, and not in proportion.
        return Curve({rows * width: _steady(loaded, rows, width) for rows, width in _SHAPES})
    tries = 1 if mx.default_device() == mx.Device(mx.cpu) else 2
    return Curve({size: min(_seconds(loaded, size) for _ in range(tries)) for size in (1, _LARGE)})


def reading(draft: LoadedModel) -> Curve:
    """What it costs to have a draft read tokens that it has missed, by their number."""
    return Curve({rows * width: min(_reading(draft, rows, width) for _ in range(2)) for rows, width in _READ})


def _reading(draft: LoadedModel, rows: int, width: int) -> float:
    began = time.perf_counter()
    caches = draft.layout.restore([None] * rows)
    caches.call(draft.model, mx.zeros((rows, width), dtype=mx.uint32), [width] * (rows - 1) + [width - 1])
    mx.eval(caches.arrays)
    return time.perf_counter() - began


def _seconds(loaded: LoadedModel, tokens: int) -> float:
    caches = loaded.layout.new()
    began = time.perf_counter()
    mx.eval(mx.argmax(caches.call(loaded.model, mx.zeros((1, tokens), dtype=mx.uint32)), axis=-1))
    return time.perf_counter() - began


def _steady(loaded: LoadedModel, rows: int, width: int) -> float:
    """Seconds of a call among others of its kind, each started before the one before it is waited for."""
    call, caches = TracedCalls(loaded.model), loaded.layout.new(rows)
    tokens = mx.zeros((rows, width), dtype=mx.uint32)
    before, ended = tokens, []
    for _ in range(_WARM + _COUNTED):
        following = mx.argmax(call(caches, tokens), axis=-1)
        start(following)
        caches.dispatched()
        mx.eval(before)
        before = following
        ended.append(time.perf_counter())
    mx.eval(before)
    return median(later - earlier for earlier, later in pairwise(ended[_WARM - 1 :]))


def _require_same_tokens(folder: Path, draft: Tokenizer, target: Tokenizer) -> None:
    if draft.backend is not None and target.backend is not None:
        wanted, has = target.backend.get_vocab(), draft.backend.get_vocab()
        differing = [token for token, number in wanted.items() if has.get(token) != number]
        if len(differing) <= (1 - _ALIKE) * len(wanted) and len(has) <= len(wanted) / _ALIKE:
            return
        found = f"{len(differing)} of the model's {len(wanted)} tokens are not the same in the draft's {len(has)}"
        if differing:
            found += f", such as {differing[0]!r}"
    elif draft.vocab_size == target.vocab_size:
        return
    else:
        found = f"the model has {target.vocab_size} tokens, the draft {draft.vocab_size}"
    raise EngineLoadError(
        f"draft {folder} has another tokenizer than the model: {found}",
        hint="Choose a smaller model of the same family as draft, or remove `draft`.",
    )
