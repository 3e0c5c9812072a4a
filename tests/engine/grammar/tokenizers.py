"""Tokenizers of several kinds, as the engine has them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from runner.engine import tokenizer as engine_tokenizer
from tests.engine.tiny import CORPUS

TEXT = '{"name": "größe 🦜", "n": -12.5e3}'


def sentencepiece() -> Tokenizer:
    """Byte fallback, ▁ for spaces, and one put before the first word: as of Llama 2."""
    alphabet = sorted({char for char in "▁" + TEXT + "".join(CORPUS) if char.isascii() or char == "▁"})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, '▁{"', "▁name", "name"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "{"), ("▁{", '"'), ("n", "a"), ("m", "e"), ("na", "me"), ("▁", "name")]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return tokenizer


def wrapped(backend: Any, eos: str) -> engine_tokenizer.Tokenizer:
    return engine_tokenizer.Tokenizer(
        encode_ids=lambda text, special: backend.encode(text, add_special_tokens=special).ids,
        decode_ids=backend.decode,
        vocab_size=backend.get_vocab_size(),
        eos_ids=frozenset({backend.token_to_id(eos)}) if eos else frozenset(),
        special_tokens={},
        backend=backend,
    )
