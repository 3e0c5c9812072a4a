"""Conversations as rows of token ids, sorted into a few lengths so that a step has few shapes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .corpus import Line, conversation
from .tokenizer import BOS, END, PAD, SPECIAL

LENGTHS = (64, 128, 256, 512, 1024)
_SHARD = 2000


@dataclass(frozen=True)
class Request:
    """What one process makes: the same request gives the same rows on any machine."""

    tokenizer: Path
    seed: int
    shard: int
    styles: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Rows:
    ids: np.ndarray  # uint16, one row a conversation, one token longer than the length
    learn: np.ndarray  # uint8, 1 where the token is to be predicted


def encode(tokenizer: Tokenizer, said: list[Line]) -> tuple[list[int], list[int]]:
    """The tokens that the chat template would give, and which of them are to be learnt."""
    ids, learn = [SPECIAL.index(BOS)], [0]
    end = SPECIAL.index(END)
    for line, encoding in zip(said, tokenizer.encode_batch_fast([line.text for line in said]), strict=True):
        ids += [SPECIAL.index(f"<|{line.role}|>"), *encoding.ids, end]
        learn += [0] + [int(line.learn)] * (len(encoding.ids) + 1)
    return ids, learn


def _shard(request: Request) -> dict[int, Rows]:
    rng = random.Random(f"{request.seed}-{request.shard}")
    tokenizer = Tokenizer.from_file(str(request.tokenizer))
    names, weights = zip(*request.styles, strict=True)
    found: dict[int, list[tuple[list[int], list[int]]]] = {length: [] for length in LENGTHS}
    for _ in range(_SHARD):
        ids, learn = encode(tokenizer, conversation(rng, rng.choices(names, weights)[0]))
        length = next((length for length in LENGTHS if len(ids) <= length + 1), LENGTHS[-1])
        found[length].append((ids[: length + 1], learn[: length + 1]))
    return {length: _rows(rows, length) for length, rows in found.items()}


def _rows(found: list[tuple[list[int], list[int]]], length: int) -> Rows:
    ids = np.full((len(found), length + 1), SPECIAL.index(PAD), np.uint16)
    learn = np.zeros((len(found), length + 1), np.uint8)
    for row, (tokens, flags) in enumerate(found):
        ids[row, : len(tokens)] = tokens
        learn[row, : len(flags)] = flags
    return Rows(ids, learn)


def make_rows(tokenizer: Path, seed: int, styles: dict[str, float], conversations: int) -> dict[int, Rows]:
    shards = range(-(-conversations // _SHARD))
    requests = [Request(tokenizer, seed, shard, tuple(styles.items())) for shard in shards]
    # Spawned, not forked: the parent may already hold a GPU.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_shard, requests))
    return {
        length: Rows(
            np.concatenate([part[length].ids for part in parts]),
            np.concatenate([part[length].learn for part in parts]),
        )
        for length in LENGTHS
    }


def batches(rows: dict[int, Rows], seed: int, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of about the same number of tokens; a length is drawn by its share of all tokens."""
    rng = np.random.default_rng(seed)
    lengths = [length for length in LENGTHS if len(rows[length].ids)]
    share = np.array([len(rows[length].ids) * length for length in lengths], float)
    while True:
        length = int(rng.choice(lengths, p=share / share.sum()))
        chosen = rng.integers(len(rows[length].ids), size=max(1, tokens // length))
        yield rows[length].ids[chosen], rows[length].learn[chosen]
