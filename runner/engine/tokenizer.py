"""What the loop needs of a tokenizer, whichever library it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from runner.engine.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    MarkingDetokenizer,
    PrefixDetokenizer,
    TokenBytes,
    token_bytes,
)


class Tokenizer(msgspec.Struct, frozen=True):
    """Text to ids and back.

    `encode_ids(text, add_special_tokens)` and `decode_ids(ids)`, which leaves special tokens out, are the library's.
    `special_tokens` are the named ones (`bos_token`, …) as chat templates see them. `backend` is the
    `tokenizers.Tokenizer` beneath, or None; `bytes_of` is found from it.
    """

    encode_ids: Callable[[str, bool], list[int]]
    decode_ids: Callable[[list[int]], str]
    vocab_size: int
    eos_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    backend: Any = None
    bytes_of: TokenBytes | None = None

    def __post_init__(self) -> None:
        own = None if self.backend is None else token_bytes(self.backend)
        msgspec.structs.force_setattr(self, "bytes_of", own)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw prompt: with the tokenizer's special tokens, unless the text brings its own."""
        bos = self.special_tokens.get("bos_token")
        return self.encode_ids(text, not (bos and text.startswith(bos)))

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, which has written every special token itself."""
        return self.encode_ids(text, False)

    def detokenizer(self, markers: Mapping[int, str] | None = None) -> Detokenizer:
        """A fresh one, for one row; it spells the special tokens in `markers`."""
        plain = PrefixDetokenizer(self.decode_ids) if self.bytes_of is None else ByteDetokenizer(self.bytes_of)
        return MarkingDetokenizer(plain, markers) if markers else plain

    def special_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """Those of `texts` that are special tokens, by id."""
        if self.backend is None:
            return {}
        added = self.backend.get_added_tokens_decoder()
        ids = {text: self.backend.token_to_id(text) for text in texts}
        return {token: text for text, token in ids.items() if token in added and added[token].special}

    def label(self, token: int) -> tuple[str, list[int]]:
        """How to show one token in a list of log-probabilities: its text and its bytes. Special tokens are spelled."""
        data = self.decode_ids([token]).encode() if self.bytes_of is None else self.bytes_of[token]
        if not data and self.backend is not None:
            data = (self.backend.id_to_token(token) or "").encode()
        return data.decode("utf-8", "replace"), list(data)
