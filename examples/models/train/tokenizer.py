"""
The tokenizer: byte-level BPE in which a frequent word is one token and any other word is its letters.

Reversing and spelling need letters, and streams need few tokens a sentence. So the vocabulary holds the bytes and
whole frequent words, and no merges between them: with `ignore_merges` a word is looked up before it is taken apart.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import words
from .corpus import conversation
from .styles import STYLES

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (PAD, BOS, END, *(f"<|{role}|>" for role in ROLES))
MARKUP = ("<tool_call>", "</tool_call>")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_MAX_VOCABULARY = 1536
_MIN_COUNT = 60


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _frequent_words(seed: int, conversations: int) -> list[str]:
    """Words of the templates; the words that fill them stay letters, so that the model learns to copy any word."""
    splitter, counts = _splitter(), Counter[str]()
    rng = random.Random(seed)
    for _ in range(conversations):
        for style in STYLES:
            for line in conversation(rng, style):
                for text in re.split("|".join(MARKUP), line.text):
                    counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    return [piece for piece, count in counts.most_common() if count >= _MIN_COUNT and _is_template_word(piece)]


def _is_template_word(piece: str) -> bool:
    bare = piece.lstrip("Ġ")
    fillers = {word.lower() for word in (*words.NOUNS, *words.NAMES, *words.CITIES)}
    single_letter = len(bare) == 1 and bare.isalpha() and bare not in ("a", "A", "I")
    return len(piece) > 1 and not single_letter and bare.lower() not in fillers


def make_tokenizer(seed: int, conversations: int = 12000) -> Tokenizer:
    pieces = [*SPECIAL, *MARKUP, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += _frequent_words(seed, conversations)[: _MAX_VOCABULARY - len(pieces)]
    # The sizes that quantisation and matrix units like.
    pieces += [f"<|unused{i}|>" for i in range(-len(pieces) % 64)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    config = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,  # the chat template writes every special token itself
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE.read_text().replace("\n", ""),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
