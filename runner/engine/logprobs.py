"""Log-probabilities from the device to what a client is shown."""

from __future__ import annotations

from collections.abc import Sequence

from runner.engine.arrays import to_list
from runner.engine.row import Row
from runner.engine.sampling import Logprobs
from runner.engine.tokenizer import Tokenizer
from runner.protocol import TokenLogprob


def read_logprobs(
    logprobs: Logprobs, rows: Sequence[Row], tokens: Sequence[int], tokenizer: Tokenizer
) -> dict[int, TokenLogprob]:
    """By row index, for the rows that asked, with as many alternatives as each asked for."""
    chosen = to_list(logprobs.chosen)
    top_tokens = to_list(logprobs.top_tokens) if logprobs.top_tokens is not None else [[]] * len(chosen)
    top_values = to_list(logprobs.top) if logprobs.top is not None else [[]] * len(chosen)
    read: dict[int, TokenLogprob] = {}
    for index, value, alternatives, values in zip(logprobs.rows, chosen, top_tokens, top_values, strict=True):
        row = rows[index]
        if row.done:
            continue
        wanted = row.sampling.logprobs or 0
        top = []
        for token, logprob in zip(alternatives[:wanted], values[:wanted], strict=True):
            text, data = tokenizer.label(token)
            top.append((text, logprob, data))
        text, data = tokenizer.label(tokens[index])
        read[index] = TokenLogprob(text, value, data, top)
    return read
