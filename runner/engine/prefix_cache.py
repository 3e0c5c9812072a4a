"""KV caches of prompts and finished rows, for prompts that begin the same.

Entries are kept per adapter key (another adapter, or another version of it, computes other values), in least recently
used order, within a limit of bytes. A hit is a copy: upstream's caches are written in place, and copying an array
shares its memory until one side is written. An entry may be used up to where it and the prompt part, if its caches can
be trimmed; otherwise (sliding windows that have wrapped, recurrent states) only whole.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

from runner.engine.arrays import start

Caches = list[Any]

_TOKEN = 4
"""Bytes of a token id: tokens are compared as bytes, at memcmp's speed."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    tokens: bytes
    caches: Caches
    nbytes: int
    trimmable: bool


class PrefixCache:
    """Maps (adapter key, tokens) to caches."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes; 0 keeps nothing."""
        self.nbytes = 0
        self._limit = limit
        self._entries: dict[str, dict[bytes, _Entry]] = {}
        # Least recently used first.
        self._order: dict[tuple[str, bytes], None] = {}

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._limit > 0

    def resize(self, limit: int) -> None:
        """Change the limit, in bytes, now."""
        self._limit = limit
        self._shrink()

    def fetch(self, adapter: str, prompt: Sequence[int]) -> tuple[Caches, int] | None:
        """Caches of the longest known beginning of `prompt`, and its length; the last token is never part of it."""
        entries = self._entries.get(adapter)
        if not entries or len(prompt) < 2:
            return None
        wanted = _pack(prompt[:-1])
        best, best_size = None, 0
        for entry in entries.values():
            if entry.trimmable:
                # Looks further only where the entry is longer than the best so far.
                if entry.tokens[: best_size + _TOKEN] == wanted[: best_size + _TOKEN]:
                    size = _common(entry.tokens, wanted)
                    if size > best_size:
                        best, best_size = entry, size
            elif len(entry.tokens) > best_size and wanted.startswith(entry.tokens):
                best, best_size = entry, len(entry.tokens)
        if best is None:
            return None
        self._touch(adapter, best.tokens)
        caches = copy.deepcopy(best.caches)
        trim_prompt_cache(caches, (len(best.tokens) - best_size) // _TOKEN)
        return caches, best_size // _TOKEN

    def store(self, adapter: str, tokens: Sequence[int], caches: Caches) -> None:
        """Keep `caches`, which hold exactly `tokens` and are not written any more."""
        if not self.enabled or not tokens:
            return
        packed = _pack(tokens)
        _compact(caches)
        nbytes = sum(cache.nbytes for cache in caches) + len(packed)
        if nbytes > self._limit:
            return
        entries = self._entries.setdefault(adapter, {})
        trimmable = can_trim_prompt_cache(caches)
        if trimmable:
            # What it begins with can be had from it by trimming.
            for known in [known for known in entries if packed.startswith(known)]:
                self._remove(adapter, known)
        elif packed in entries:
            self._remove(adapter, packed)
        self._entries.setdefault(adapter, {})[packed] = _Entry(packed, caches, nbytes, trimmable)
        self._order[adapter, packed] = None
        self.nbytes += nbytes
        self._shrink()

    def evict(self, adapter: str) -> None:
        """Forget everything of an adapter."""
        for tokens in list(self._entries.get(adapter, ())):
            self._remove(adapter, tokens)

    def release(self, nbytes: int) -> int:
        """Give up entries until at least `nbytes` bytes are free, or none is left; returns how many were freed."""
        before = self.nbytes
        while self._order and before - self.nbytes < nbytes:
            self._remove(*next(iter(self._order)))
        return before - self.nbytes

    def _shrink(self) -> None:
        while self.nbytes > self._limit:
            self._remove(*next(iter(self._order)))

    def _touch(self, adapter: str, tokens: bytes) -> None:
        del self._order[adapter, tokens]
        self._order[adapter, tokens] = None

    def _remove(self, adapter: str, tokens: bytes) -> None:
        entries = self._entries[adapter]
        self.nbytes -= entries.pop(tokens).nbytes
        del self._order[adapter, tokens]
        if not entries:
            del self._entries[adapter]


def _compact(caches: Caches) -> None:
    """Let go of the room that upstream's caches keep for tokens to come: up to 255 of them."""
    for cache in caches:
        if type(cache) is KVCache and cache.keys is not None and cache.keys.shape[2] > cache.offset:
            keys, values = cache.keys_and_values()
            cache.keys, cache.values = mx.contiguous(keys), mx.contiguous(values)
            start(cache.keys, cache.values)


def _pack(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Bytes of whole tokens that both begin with, by bisection."""
    low, high = 0, min(len(a), len(b)) // _TOKEN
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * _TOKEN] == b[: middle * _TOKEN]:
            low = middle
        else:
            high = middle - 1
    return low * _TOKEN
