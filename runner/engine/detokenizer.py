"""Token ids to text, one token at a time, never sending half a character.

Concatenated pieces equal what the tokenizer decodes from all ids at once, special tokens left out and no spaces
"cleaned up": the text is what the model wrote. Where the model writes bytes that are not UTF-8, each maximal bad part
becomes one U+FFFD.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

REPLACEMENT: Final = "\ufffd"
_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """Text of one row."""

    def add(self, token: int) -> str:
        """The text that is complete now."""
        ...

    def flush(self) -> str:
        """What is left when nothing more will come; an incomplete character becomes U+FFFD."""
        ...


class TokenBytes:
    """The bytes each token stands for, looked up once per token.

    `decode_piece` maps the vocabulary's spelling of a token to bytes; the `special` tokens have none.
    """

    def __init__(self, backend: Any, decode_piece: Callable[[str], bytes], *, strip_first_space: bool) -> None:
        self._id_to_token = backend.id_to_token
        self._decode_piece = decode_piece
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(token for token, one in added.items() if one.special)
        self._known: dict[int, bytes] = {
            token: b"" if one.special else decode_piece(one.content) for token, one in added.items()
        }
        self.strip_first_space = strip_first_space

    def __getitem__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            piece = self._id_to_token(token)
            known = self._known[token] = b"" if piece is None else self._decode_piece(piece)
        return known


class ByteDetokenizer:
    """For vocabularies whose every token is a string of bytes: one dictionary look-up a token."""

    __slots__ = ("_decode", "_strip", "_table")

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decode = _UTF8("replace").decode
        self._strip = table.strip_first_space

    def add(self, token: int) -> str:
        """See Detokenizer."""
        return self._trim(self._decode(self._table[token]))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._trim(self._decode(b"", True))

    def _trim(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class MarkingDetokenizer:
    """Spells certain special tokens, which are otherwise left out: whoever parses the text looks for them."""

    __slots__ = ("_inner", "_markers")

    def __init__(self, inner: Detokenizer, markers: Mapping[int, str]) -> None:
        """`markers` are the spellings by id."""
        self._inner = inner
        self._markers = markers

    def add(self, token: int) -> str:
        """See Detokenizer."""
        marker = self._markers.get(token)
        return self._inner.add(token) if marker is None else self._inner.flush() + marker

    def flush(self) -> str:
        """See Detokenizer."""
        return self._inner.flush()


class PrefixDetokenizer:
    """For every other tokenizer: decodes a window of recent tokens and sends what has been added to it.

    The window begins at the last place where text was complete, so that decoders which look at neighbours see them
    (the method of vLLM and text-generation-inference).
    """

    __slots__ = ("_begin", "_decode", "_sent", "_tokens")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = 0
        self._sent = 0

    def add(self, token: int) -> str:
        """See Detokenizer."""
        self._tokens.append(token)
        return self._new(final=False)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._sent])
        now = self._decode(self._tokens[self._begin :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._begin, self._sent = self._sent, len(self._tokens)
        return now[len(before) :]


def token_bytes(backend: Any) -> TokenBytes | None:
    """The byte table of a `tokenizers.Tokenizer`, or None when its decoder is of no known byte-wise kind."""
    state = _decoder_state(backend)
    if state.get("type") == "ByteLevel":
        return TokenBytes(backend, _byte_level, strip_first_space=False)
    steps = state.get("decoders") or []
    if steps[:3] == _SENTENCEPIECE:
        rest = steps[3:]
        if not rest or rest == [_STRIP]:
            return TokenBytes(backend, _sentencepiece, strip_first_space=bool(rest))
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return TokenBytes(backend, _byte_level, strip_first_space=False)
    return None


_SENTENCEPIECE: Final = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP: Final = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _decoder_state(backend: Any) -> dict[str, Any]:
    if backend.decoder is None:
        return {}
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's reversible spelling of bytes as printable characters: bytes that print stand for themselves, the others
    for the code points from 256 on, in order (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(list(rest))}


_ALPHABET: Final = _byte_level_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()
