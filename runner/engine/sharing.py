"""When prompts that wait are taken up, and how many tokens of them one model call may have.

On the CPU, and on Metal, a prompt costs what its tokens cost: it is best begun at once, in calls as narrow as running
rows like them. On CUDA the host needs as long to launch a call for one prompt as for eight (5 to 6 ms for the geometry
of Llama-3.2-1B on one H100, where a decode step takes 2 to 5), and about as long again for a row that joins the batch
and for one that leaves it as a step's half. With 128 rows of 128 tokens a request ends in each step, and without this
each step carried all of that for one prompt. So prompts share wider calls there, and in large batches wait a few steps
for each other; what joined together often leaves together.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx
import msgspec

from runner.engine.kv.masks import FEW

_LEAST: Final = 256
"""Tokens that caches have room for at least."""

_NARROW: Final = 512
"""Tokens of a call beyond which its width is a multiple of twice as many."""


class Sharing(msgspec.Struct, frozen=True):
    """How prompts share model calls.

    A call of several short ones may have `times` the tokens of a chunk of a long prompt, up to `most`. While rows
    decode, prompts wait until there is one for every `rows` of these, for `steps` steps at most; with 0 of either
    nobody waits. They wait as well for prompts that are expected, which would else have a call of their own: that costs
    rows that decode some `call` steps, a step of waiting costs each prompt that waits a token. Prompts get as much room
    as the batch they will join, where that is at most `roomier` times what they need: nothing has to be cleared behind
    them then. Where padding does no harm, the keys that a call attends to are a multiple of `multiple`, or, where it
    attends to them as they are, its own tokens.
    """

    times: int = 1
    most: int = 0
    rows: int = 0
    steps: int = 0
    call: float = 0.0
    roomier: int = 0
    multiple: int = 1

    def tokens(self, chunk: int) -> int:
        """How many a call of several prompts may have, padding included, where one of a long prompt has `chunk`."""
        return max(chunk, min(self.times * chunk, self.most))

    def width(self, before: int, tokens: int, reach: int = 0) -> int:
        """Tokens of a call that has `tokens`, with padding, after at most `before` others of a row.

        Up to `reach` tokens in all, launches attend to keys where they are, however many. So what is known already
        does not count there, and widths are few: each is a shape of its own.
        """
        if tokens <= FEW:
            return tokens
        if before + tokens > reach:
            return _up(before + tokens, self.multiple) - before
        multiple = self.multiple if tokens <= _NARROW else 2 * self.multiple
        while before + _up(tokens, multiple) > reach:
            multiple //= 2
        return _up(tokens, multiple)

    def holds(self, decoding: int, ready: int, held: int, spent: int = 0, expected: int = 0) -> bool:
        """Whether `ready` prompts wait for more while `decoding` rows do.

        They have been held back in `held` steps, in which prompts have waited `spent` times. So many more that could be
        taken up are `expected` any moment; who could not be anyway is not ready.
        """
        if held >= self.steps:
            return False
        return 0 < ready * self.rows < decoding or (expected > 0 and spent + ready <= self.call * decoding)

    def room(self, needed: int, batch: int) -> int:
        """Tokens to have room for, for prompts that need `needed` and join a batch with `batch`; 0 for no matter."""
        return batch if needed <= batch <= self.roomier * max(_LEAST, needed) else 0


def _up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


AT_ONCE: Final = Sharing()
"""Where a prompt costs what its tokens cost."""

# tests/bench/sharing.py reckons what they bring from what was measured on one H200. With prompts and answers of 256 and
# 128 tokens, give or take a half, 128 clients get 30,200 tokens/s in place of 22,100 (24,400 with wider calls alone),
# the first token after 19 ms in place of 18; 32 clients 14,100 in place of 12,700, and the first after 9 ms in place of
# 6.5. With answers of one length, which end together, and all of it paced, 32 clients get 17,050 in place of 16,330 by
# waiting for those that follow (17,150 if these came at once), and the first after 22 ms in place of 17.
TOGETHER: Final = Sharing(times=4, most=2048, rows=16, steps=8, call=2.0, roomier=4, multiple=32)
"""Where a call costs what its launches cost, and cuBLAS has only slow kernels for lines that are no multiple of 16
bytes: with 255 keys a line of scores is none."""


def usual() -> Sharing:
    """What suits the device that is computed on."""
    launched = bool(mx.cuda.is_available()) and mx.default_device() == mx.Device(mx.gpu)
    return TOGETHER if launched else AT_ONCE
