"""Prompts that no cache has seen: words drawn from a seed and the request's number, which they end with."""

from __future__ import annotations

import random
from typing import Any, Final

from runner.bench.job import SHARED_PREFIX_INDEX, Load

_TEXT: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face level office "
    "door health person art war history party result change morning reason research girl guy moment air teacher force "
)
WORDS: Final = _TEXT.split()


def prompt(load: Load, index: int) -> str:
    """The text of request number `index`: `shared_words` that all requests of the seed have, then its own."""
    own = f"{_draw(load.seed, index, load.words)} {index}"
    if not load.shared_words:
        return own
    return f"{_draw(load.seed, SHARED_PREFIX_INDEX, load.shared_words)} {own}"


def answer_tokens(load: Load, index: int) -> int:
    """How long the answer to request number `index` may be."""
    if not load.spread:
        return load.max_tokens
    share = random.Random(f"{load.seed}/{index}/answer").uniform(-load.spread, load.spread)
    return max(1, round(load.max_tokens * (1 + share)))


def _draw(seed: int, index: int, count: int) -> str:
    return " ".join(random.Random(f"{seed}/{index}").choices(WORDS, k=count))


def request_fields(load: Load, index: int, *, model: str, usage: bool) -> dict[str, Any]:
    """The JSON object of request number `index`."""
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt(load, index)}],
        "max_tokens": answer_tokens(load, index),
        "stream": True,
        **load.body,
    }
    if model:
        fields["model"] = model
    if usage:
        fields["stream_options"] = {"include_usage": True}
    if load.adapters:
        adapter = load.adapters[index % len(load.adapters)]
        if adapter:
            fields[load.adapter_field] = adapter
    return fields
