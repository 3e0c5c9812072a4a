"""The next tokens that grammars allow, for all their rows at once.

llguidance writes one bit a token into memory of the host; the device unpacks the bits where it applies them. Rows
without a grammar are not touched.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from functools import cache, cached_property
from math import inf
from typing import TYPE_CHECKING, Final

import mlx.core as mx
import msgspec

from runner.engine.arrays import from_bytes
from runner.engine.grammar.matcher import RowGrammar

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_SEVERAL: Final = 4
"""Rows from which on threads pay."""

_ALL: Final = 0xFFFFFFFF
"""A word of llguidance's masks."""

USUAL: Final = 0.005
"""Seconds a mask may take without being noticed; most take 50 µs."""

PATIENCE: Final = 0.5
"""Seconds by which the masks of one answer may exceed the usual, all together, before the row ends."""

_SUSPICIOUS: Final = 0.02
"""Seconds for the masks of a step from which on rows are looked at one by one."""

_WATCHED: Final = 64
"""Steps that they are looked at for."""


class Mask(msgspec.Struct, frozen=True):
    """`packed` [R, T, bytes]: a bit for each token allowed at T positions of the rows `rows`, None for every row."""

    packed: mx.array
    rows: mx.array | None

    def apply(self, logits: mx.array) -> mx.array:
        """Logits [B, T, V], -inf where a token is not allowed, whatever its logit is.

        Where those of the allowed ones are not numbers, it is the other way round: whatever is chosen then is a token
        that the row's grammar does not take, and the row ends.
        """
        if self.rows is None:
            return _masked(logits, self.packed)
        some = logits.astype(logits.dtype)  # another name for the same, so that the caller's stays what it is
        some[self.rows] = _masked(logits[self.rows], self.packed)
        return some


def _masked(logits: mx.array, packed: mx.array) -> mx.array:
    allowed = _unpacking()[packed].reshape(*packed.shape[:2], -1)
    allowed = allowed[..., : logits.shape[-1]]
    # Not by adding -inf, which makes no number of a logit of +inf.
    masked = mx.where(allowed, logits, -inf)
    numbers = mx.max(masked, axis=-1, keepdims=True).abs() < inf  # NaN is the largest of all, and below nothing
    return mx.where(numbers, masked, mx.where(allowed, -inf, mx.array(0, dtype=logits.dtype)))


@cache
def _unpacking() -> mx.array:
    """[256, 8]: the bits of each byte. Looking bytes up takes an eighth of shifting bits out of them."""
    return mx.array([[bool(byte >> bit & 1) for bit in range(8)] for byte in range(256)])


class _Work(msgspec.Struct, frozen=True):
    """One call of llguidance: masks from index `at` on, before each of the `drafted` tokens and after the last."""

    grammar: RowGrammar
    matcher: LLMatcher
    at: int
    drafted: list[int]


class GrammarMasks:
    """Computes masks for logits of one width."""

    def __init__(self, width: int) -> None:
        self._words = -(-width // 32)
        self._watched = 0

    def next(self, rows: Sequence[RowGrammar | None]) -> Mask | None:
        """What each row may say next; None when every row may say everything.

        A grammar may turn out to have `ended` with this: then its row has nothing more to say.
        """
        bound = [(i, grammar, ()) for i, grammar in enumerate(rows) if grammar is not None and _binds(grammar)]
        mask = self.drafted(bound, 1)
        return Mask(mask.packed, None) if mask is not None and len(bound) == len(rows) else mask

    def drafted(self, rows: Sequence[tuple[int, RowGrammar, Sequence[int]]], positions: int) -> Mask | None:
        """What rows, by index, may say before and after each of their drafted tokens: at most `positions` - 1 a row.

        No grammar takes a token by this. Everything is allowed after a drafted token that its grammar does not take,
        and after its end: no such position can be accepted.
        """
        if not rows:
            return None
        memory = array("I", b"\xff" * (4 * self._words * positions * len(rows)))
        todo: list[_Work] = []
        beside: list[tuple[int, frozenset[int]]] = []
        for k, (_, grammar, tokens) in enumerate(rows):
            self._plan(grammar, k * positions, list(tokens), memory, todo, beside)
        self._compute(todo, memory)
        for at, also in beside:
            for token in also:
                memory[at * self._words + token // 32] |= 1 << token % 32
        packed = from_bytes(memoryview(memory)).reshape(len(rows), positions, 4 * self._words)
        return Mask(packed, mx.array([i for i, _, _ in rows], dtype=mx.int32))

    def _plan(
        self,
        grammar: RowGrammar,
        at: int,
        drafted: list[int],
        memory: array[int],
        todo: list[_Work],
        beside: list[tuple[int, frozenset[int]]],
    ) -> None:
        """What to compute for one row, and what to allow at its start; what comes before is written at once."""
        preface, matcher = grammar.preface, grammar.matcher
        for p in range(len(drafted) + 1):
            if preface is None or preface.stage == "within":
                todo.append(_Work(grammar, matcher, at + p, drafted[p:]))
                return
            then = preface.after(drafted[p]) if p < len(drafted) else preface
            if preface.stage == "before" and not preface.may_call:
                for token in preface.ends:
                    memory[(at + p) * self._words + token // 32] &= ~(1 << token % 32) & _ALL
            elif preface.stage == "start":
                beside.append((at + p, preface.beside))
                todo.append(_Work(grammar, matcher, at + p, drafted[p:] if then.stage == "within" else []))
                if then.stage == "within":
                    return
                matcher = matcher.deep_copy()  # llguidance takes each only once at a time
            preface = then

    def _compute(self, todo: list[_Work], memory: array[int]) -> None:
        """Together, until that is slow: whose fault it is can only be told when they are called one by one."""
        alone = self._watched > 0 or len(todo) < _SEVERAL
        self._watched = max(0, self._watched - 1)
        for group in [[work] for work in todo] if alone else [todo]:
            started = time.perf_counter()
            self._call(group, memory)
            seconds = time.perf_counter() - started
            if len(group) == 1:
                _charge(group[0].grammar, seconds - USUAL * (1 + len(group[0].drafted)))
            elif seconds > _SUSPICIOUS:
                self._watched = _WATCHED

    def _call(self, group: list[_Work], memory: array[int]) -> None:
        address, _ = memory.buffer_info()
        size, count = 4 * self._words, len(memory) // self._words
        next_ones = [(work.matcher, work.at) for work in group if not work.drafted]
        drafted = [(work.matcher, work.at, work.drafted) for work in group if work.drafted]
        if len(next_ones) == 1:
            next_ones[0][0].unsafe_compute_mask_ptr(address + next_ones[0][1] * size, size)
        elif next_ones:
            self._executor.unsafe_compute_mask_ptr(next_ones, address, size, count)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, address, size, count)

    @cached_property
    def _executor(self) -> LLExecutor:
        # Imported here: 60 ms that only a request with a grammar pays, and has paid by now.
        from llguidance import LLExecutor  # noqa: PLC0415

        return LLExecutor()


def _binds(grammar: RowGrammar) -> bool:
    if grammar.ended or grammar.stage == "elsewhere":
        return False
    return grammar.preface is None or grammar.stage != "before" or not grammar.preface.may_call


def _charge(grammar: RowGrammar, excess: float) -> None:
    """A grammar whose masks take long holds up every row: it pays, and ends when it has paid too much."""
    grammar.spent = max(0.0, grammar.spent + excess)
    if grammar.spent > PATIENCE:
        grammar.refused = "the grammar is too ambiguous: finding the tokens that it allows takes too long"
