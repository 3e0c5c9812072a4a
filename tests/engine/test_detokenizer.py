"""Text from tokens one by one equals what the tokenizer makes of all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from runner.engine.detokenizer import ByteDetokenizer, Detokenizer, PrefixDetokenizer, token_bytes
from tests.engine.tiny import CORPUS, SPECIAL, backend


def stream(detokenizer: Detokenizer, tokens: list[int]) -> tuple[str, list[str]]:
    """The whole text, and its pieces."""
    pieces = [detokenizer.add(token) for token in tokens]
    pieces.append(detokenizer.flush())
    return "".join(pieces), pieces


def sentencepiece(*, strip: bool) -> Tokenizer:
    """A BPE with ▁ for spaces and bytes for what it does not know, as Llama 2 and Gemma have."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁hello", "▁world", "lo", "h", "e", "l", "o", "▁the", "é", ",", "▁▁"]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """A decoder that looks at neighbours: no byte table can stand for it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def any_tokens(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=30)


@given(tokens=any_tokens(backend().get_vocab_size()))
def test_byte_level(tokens: list[int]) -> None:
    table = token_bytes(backend())
    assert table is not None
    assert stream(ByteDetokenizer(table), tokens)[0] == backend().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["größe 東京 🦜🦜 naïve", "🇩🇪 👩‍👩‍👧", "tab\tand\nnewline"])
def test_characters_split_over_tokens_come_whole(text: str) -> None:
    tokens = [token for char in text for token in backend().encode(char, add_special_tokens=False).ids]
    table = token_bytes(backend())
    assert table is not None
    whole, pieces = stream(ByteDetokenizer(table), tokens)
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(tokens) > len(text) or text.isascii(), "nothing was split"


def test_half_a_character_at_the_end_is_one_replacement() -> None:
    table = token_bytes(backend())
    assert table is not None
    tokens = backend().encode("🦜", add_special_tokens=False).ids
    for cut in range(1, len(tokens)):
        text, pieces = stream(ByteDetokenizer(table), tokens[:cut])
        assert text == "\ufffd"
        assert pieces[-1] == "\ufffd", "held until the end"


def test_special_tokens_have_no_text_and_added_ones_have_theirs() -> None:
    table = token_bytes(backend())
    assert table is not None
    assert [table[backend().token_to_id(token)] for token in SPECIAL] == [b""] * len(SPECIAL)
    spm = token_bytes(sentencepiece(strip=True))
    assert spm is not None
    assert spm[sentencepiece(strip=True).token_to_id("<think>")] == b"<think>"
    assert table[10**6] == b"", "a padded vocabulary has ids without a token"


@pytest.mark.parametrize("strip", [True, False])
@given(data=st.data())
@settings(max_examples=60)
def test_sentencepiece(strip: bool, data: st.DataObject) -> None:
    tokenizer = sentencepiece(strip=strip)
    words = [t for t in range(tokenizer.get_vocab_size()) if not 3 <= t < 259]
    characters = [[3 + byte for byte in char.encode()] for char in "é東🦜"]
    runs = data.draw(st.lists(st.sampled_from([[w] for w in words] + characters), max_size=12))
    tokens = [token for run in runs for token in run]
    table = token_bytes(tokenizer)
    assert table is not None
    assert stream(ByteDetokenizer(table), tokens)[0] == tokenizer.decode(tokens, skip_special_tokens=True)


@given(data=st.data())
@settings(max_examples=60)
def test_any_other_decoder(data: st.DataObject) -> None:
    tokenizer = wordpiece()
    assert token_bytes(tokenizer) is None
    tokens = data.draw(any_tokens(tokenizer.get_vocab_size()))
    assert stream(PrefixDetokenizer(tokenizer.decode), tokens)[0] == tokenizer.decode(tokens)


@given(tokens=any_tokens(backend().get_vocab_size()))
@settings(max_examples=60)
def test_the_general_way_holds_back_half_characters_too(tokens: list[int]) -> None:
    text, _ = stream(PrefixDetokenizer(backend().decode), tokens)
    assert text == backend().decode(tokens, skip_special_tokens=True)
