"""Log-probabilities from the device to what a client is shown."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from runner.engine.arrays import to_list
from runner.engine.row import Row
from runner.engine.sampling import Logprobs
from runner.engine.tokenizer import Tokenizer
from runner.protocol import TokenLogprob


def read_logprobs(
    logprobs: Logprobs, rows: Sequence[Row], tokens: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> dict[int, list[TokenLogprob]]:
    """By row index, for the rows that asked, for each of their tokens, with as many alternatives as each asked for."""
    chosen = to_list(logprobs.chosen)
    top_tokens = to_list(logprobs.top_tokens) if logprobs.top_tokens is not None else None
    top_values = to_list(logprobs.top) if logprobs.top is not None else None
    read: dict[int, list[TokenLogprob]] = {}
    for at, index in enumerate(logprobs.rows):
        row = rows[index]
        if row.done:
            continue
        wanted = row.sampling.logprobs or 0
        read[index] = []
        for step, token in enumerate(tokens[index]):
            top = []
            if top_tokens is not None and top_values is not None:
                for other, logprob in zip(top_tokens[at][step][:wanted], top_values[at][step][:wanted], strict=True):
                    if logprob == -inf:  # a grammar allows fewer
                        break
                    text, data = tokenizer.label(other)
                    top.append((text, logprob, data))
            text, data = tokenizer.label(token)
            read[index].append(TokenLogprob(text, chosen[at][step], data, top))
    return read
