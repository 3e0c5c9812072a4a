"""How much of a prompt's model call is started between two steps of the running rows.

A model call is a graph, and starting what some of its layers write starts no more than they need. So the call of a
prompt is built at once, and started layer by layer, a few in each step of the batch: rows that decode wait for a part
of a prompt, not for all of it. How long a layer takes is learnt from how much longer steps were that had some, since
neither tokens nor operations say it: with few tokens the host is what takes long, with many the device.

To build a call, and to have its rows join, takes a few layers' time each: where rows are many beside the prompts that
wait, that has steps of its own. What layers take is told by the steps between.

What that costs are tokens: rows that wait for all of a call get theirs later, and none less, while in each step that it
is spread over, the rows that it brings get none. So it is spread the less, the more of the batch they are, and at most
over a part of the steps after which as many prompts come again: where calls take longer than that, a queue forms.
"""

from __future__ import annotations

from typing import Final

import msgspec

_WEIGHT: Final = 0.3
"""Of the last observation, in what is known of steps and layers."""

_MOST_TIMES: Final = 3.0
"""What a call took counts as at most so many times what it was thought to: something else may have held it up."""

_WORTH: Final = 16
"""Rows that may have to wait a step's time for each prompt that waits. Reckoned for one H100 (tests/bench/sharing.py),
8 clients have their first token after 14 ms, for 19 where steps become twice as long at most, and 12 without pacing."""

_LEAST: Final = 0.5
"""Of a step's time, that is given to prompts however many rows decode."""

_SHARE: Final = 0.5
"""Of the steps between prompts, in which calls are started, but for two steps that each may have. Reckoned for 16 rows
of the demo model on two cores, prompts of 100 and 200 tokens and answers of 32, they get 0.98 and 0.97 of the tokens/s
that they get without pacing, for 0.89 and 0.92 without this, and the first token after 0.3 and 0.5 s, for 0.6 and 1.9.
"""

_UNNOTICED: Final = 0.02
"""Seconds that rows may wait whatever their steps take: nobody reads that fast."""

_OLD: Final = 64
"""Steps after which it is worth two without a prompt to see again how long such a step is."""

_SETTLED: Final = 2
"""Steps, the last with layers included, after which a call has taken all the time that it takes."""

_OTHER: Final = 2
"""Batches are of different sizes if one has so many times the rows of the other."""


class Pacing:
    """Learns how long steps and layers take, and says how many layers fit between two steps."""

    def __init__(self) -> None:
        self._plain: _Plain | None = None
        self._costs: dict[int, float] = {}
        self._call: _Call | None = None
        self._coming = _Coming()
        self._age = 0
        self._alone = 0

    @property
    def step(self) -> float | None:
        """Seconds of a step without prompts, None until that is known."""
        return None if self._plain is None else self._plain.seconds

    def knows(self, decoding: int) -> bool:
        """Whether it is known how long a step of so many rows is. If not, a few steps without prompts will tell."""
        plain = self._plain
        return plain is not None and self._age < _OLD and not plain.other(decoding)

    def layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        """How many of a call's `layers` to start in each step, where it has so many `tokens`, padding included.

        While rows decode, their steps become longer by as much as prompts that are `waiting` (those of the call
        included) are many beside the rows that are `decoding`. Twice as long at most, unless that is not noticed, or
        more prompts wait than rows decode. Asked once a step in which some are started.
        """
        now = self._layers(tokens, layers, decoding, waiting)
        if (call := self._call) is not None:
            call.now = min(now, call.left)
        return now

    def _layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        step, cost = self.step, self._cost(tokens)
        if not decoding or step is None or cost is None:
            return layers
        most = max(1, int(_wait(step, waiting / decoding) / cost))
        if self._call is not None:
            most = max(most, -(-layers // self._call.most_steps))
        return -(-layers // -(-layers // most)) if most < layers else layers

    def apart(self, decoding: int, waiting: int) -> bool:
        """Whether a call is built in a step in which no layer is started, and its rows join in another one."""
        return self.step is not None and bool(self._costs) and decoding >= _WORTH * waiting

    def begun(self, tokens: int, layers: int, prompts: float) -> None:
        """A call begins in this step, of so many `prompts`, or such a part of a long one."""
        self._close()
        self._coming.begun(prompts)
        self._call = _Call(tokens, layers, max(2, int(_SHARE * prompts * self._coming.steps_between)))

    def started(self) -> None:
        """The last of its layers are started in this step."""
        if self._call is not None:
            self._call.started = True

    def dropped(self) -> None:
        """The call under way is given up: what it took tells nothing."""
        self._call = None

    def stepped(self, seconds: float, decoding: int, *, changed: bool) -> None:
        """A step of so many rows took so long; `changed` says that rows had come or gone in it."""
        self._age += 1
        self._coming.steps += 1
        if (call := self._call) is not None:
            self._alone = 0
            call.stepped(seconds, changed=changed)
            # The host waits for the device's work of one step in the next.
            call.settled += call.started
            if call.settled == _SETTLED:
                self._close()
            return
        # The first step after a call, or with other rows, has what is left of that.
        self._alone = 0 if changed else self._alone + 1
        if self._alone > 1:
            self._observe(seconds, decoding)

    def _observe(self, seconds: float, decoding: int) -> None:
        plain = self._plain
        if plain is None or plain.other(decoding) or self._age >= _OLD:
            self._plain = _Plain(seconds, decoding)
        else:
            # What takes much longer than it did is no step's own.
            found = min(seconds, _MOST_TIMES * plain.seconds)
            self._plain = _Plain(plain.seconds + _WEIGHT * (found - plain.seconds), decoding)
        self._age = 0

    def _close(self) -> None:
        call, self._call, step = self._call, None, self.step
        if call is None or not call.started or step is None:
            return
        key = call.tokens.bit_length()
        found = call.found(step)
        known = self._costs.get(key)
        if known is None:
            self._costs[key] = found
        else:
            self._costs[key] = known + _WEIGHT * (min(found, _MOST_TIMES * known + step / call.layers) - known)

    def _cost(self, tokens: int) -> float | None:
        """Seconds a layer, as calls of about as many tokens took; else as the nearest ones did, in proportion above."""
        if not self._costs:
            return None
        key = tokens.bit_length()
        nearest = min(self._costs, key=lambda known: abs(known - key))
        return max(1e-9, self._costs[nearest] * 2.0 ** max(0, key - nearest))


def _wait(step: float, waiting: float) -> float:
    """Seconds that may be added to steps of `step` seconds, where so many prompts wait for each row that decodes."""
    worth = _WORTH * waiting
    return max(step * max(_LEAST, min(worth, 1.0), waiting), min(step * worth, _UNNOTICED))


class _Plain(msgspec.Struct, frozen=True):
    """A step without prompts: how long it takes with so many rows."""

    seconds: float
    rows: int

    def other(self, rows: int) -> bool:
        """Whether a batch of so many rows says nothing of it."""
        return max(rows, self.rows) > _OTHER * min(rows, self.rows) + 1


class _Coming:
    """How often prompts come, as the last few did. Chunks of one count as one, however many they are."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps since the last call began."""
        self._steps = 0.0
        self._prompts = 0.0

    def begun(self, prompts: float) -> None:
        """A call of so many has begun."""
        kept = (1 - _WEIGHT) ** prompts
        self._steps = kept * self._steps + self.steps
        self._prompts = kept * self._prompts + prompts
        self.steps = 0

    @property
    def steps_between(self) -> float:
        """From one prompt to the next; some have begun."""
        return self._steps / self._prompts


class _Call:
    """A call that is under way, and the steps since it began."""

    def __init__(self, tokens: int, layers: int, most_steps: int) -> None:
        self.tokens = tokens
        self.layers = layers
        self.most_steps = most_steps
        self.left = layers
        self.now = 0
        """Layers that are started in this step."""
        self.started = False
        self.settled = 0
        self._all = _Steps()
        self._between = _Steps()

    def stepped(self, seconds: float, *, changed: bool) -> None:
        """A step has ended."""
        if self.now and self._all.steps and not changed:
            self._between.add(seconds, self.now)
        self._all.add(seconds, self.now)
        self.left -= self.now
        self.now = 0

    def found(self, step: float) -> float:
        """Seconds a layer, where steps without any take so long: as those in which nothing else was done tell."""
        if self._between.steps > 1:
            return self._between.beyond(step) / self._between.layers
        return self._all.beyond(step) / self.layers


class _Steps:
    """Some steps together."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.layers = 0

    def add(self, seconds: float, layers: int) -> None:
        """One more, in which so many layers were started."""
        self.seconds += seconds
        self.steps += 1
        self.layers += layers

    def beyond(self, step: float) -> float:
        """Seconds that they took longer than as many without layers."""
        return max(0.0, self.seconds - self.steps * step)
