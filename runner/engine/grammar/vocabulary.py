"""A model's tokens as llguidance takes them.

Importing this imports llguidance (60 ms): only a request with a grammar pays for it.
"""

from __future__ import annotations

from functools import cached_property

from llguidance import LLTokenizer, TokenizerWrapper

from runner.engine.detokenizer import TokenBytes
from runner.engine.tokenizer import Tokenizer


class NoGrammars(Exception):  # noqa: N818 - a condition
    """The model's tokens are not strings of bytes one by one; the message says so."""


def grammar_vocabulary(tokenizer: Tokenizer, width: int) -> LLTokenizer:
    """The vocabulary for logits of `width` tokens. Raises NoGrammars.

    Ids beyond the tokenizer's own are never allowed. Takes half a second for 128,000 tokens, 0.3 s of it without
    letting other threads run.
    """
    table = tokenizer.bytes_of
    if table is None:
        raise NoGrammars("this model's tokenizer does not map its tokens to bytes one by one")
    ends = sorted(token for token in tokenizer.eos_ids if token < width)
    # llguidance wants an end token of every model; without one the last token stands in, and is an end nowhere else.
    ends = ends or [min(width, tokenizer.vocab_size) - 1]
    source = TokenizerWrapper(_Source(tokenizer, table, width, ends))
    return LLTokenizer(source, n_vocab=width, eos_token=ends, slices=LLTokenizer.json_slices())


class _Source:
    """What llguidance reads of a tokenizer: the attributes and the call have the names that it wants."""

    def __init__(self, tokenizer: Tokenizer, table: TokenBytes, width: int, ends: list[int]) -> None:
        special = sorted({*(token for token in table.special if token < width), *ends})
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.special_token_ids = special
        self.tokens = [table[token] for token in range(min(width, tokenizer.vocab_size))]
        self.tokens += [b""] * (width - len(self.tokens))
        for token in special:
            self.tokens[token] = (tokenizer.backend.id_to_token(token) or "").encode()
        self._encode = tokenizer.encode_rendered
        self._table = table

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text that the grammar forces, as the model would have been taught to write it."""
        data = text if isinstance(text, bytes) else text.encode()
        readable = data.decode("utf-8", "replace")
        # A line break keeps tokenizers from putting a space before the first word.
        for before in (b"", b"\n"):
            tokens = self._encode(before.decode() + readable)
            for start in range(len(before) * 3 + 1):
                if self._bytes(tokens[start:]) == data:
                    return tokens[start:]
        return self._greedy(data)

    def _bytes(self, tokens: list[int]) -> bytes:
        return b"".join([self._table[token] for token in tokens])

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token that fits, over and over: for texts that spell special tokens, or are not UTF-8."""
        tokens = []
        while data:
            size = next((size for size in range(min(len(data), self._longest), 0, -1) if data[:size] in self._ids), 1)
            tokens.append(self._ids.get(data[:size], 0))
            data = data[size:]
        return tokens

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {data: token for token, data in enumerate(self.tokens) if data and token not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))
