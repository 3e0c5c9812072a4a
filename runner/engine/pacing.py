"""How much of a prompt's model call is started between two steps of the running rows.

A model call is a graph, and starting what some of its layers write starts no more than they need. So the call of a
prompt is built at once, and started layer by layer, a few in each step of the batch: rows that decode wait for a part
of a prompt, not for all of it. How long a layer takes is learnt from how much longer steps were that had some, since
neither tokens nor operations say it: with few tokens the host is what takes long, with many the device.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

_KEPT: Final = 31
"""Steps without a prompt, of which the median says how long a step is."""

_LEAST: Final = 5

_WEIGHT: Final = 0.3
"""Of the last call, in what a layer takes."""

_MOST_TIMES: Final = 3.0
"""What a call took counts as at most so many times what it was thought to: something else may have held it up."""


class Pacing:
    """Learns how long steps and layers take, and says how many layers fit between two steps."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=_KEPT)
        self._costs: dict[int, float] = {}
        self._call: _Call | None = None

    @property
    def step(self) -> float | None:
        """Seconds of a step without prompts, None until that is known."""
        return median(self._steps) if len(self._steps) >= _LEAST else None

    def layers(self, tokens: int, layers: int, decoding: int, waiting: int) -> int:
        """How many of a call's `layers` to start in each step, where it has so many `tokens`, padding included.

        While rows decode, their steps become twice as long at most, or longer by as much as more prompts are `waiting`
        (those of the call included) than rows are `decoding`.
        """
        step, cost = self.step, self._cost(tokens)
        if not decoding or step is None or cost is None:
            return layers
        most = max(1, int(step * max(1.0, waiting / decoding) / cost))
        return -(-layers // -(-layers // most)) if most < layers else layers

    def begun(self, tokens: int, layers: int) -> None:
        """A call begins in this step."""
        self._close()
        self._call = _Call(tokens, layers)

    def started(self) -> None:
        """The last of its layers are started in this step."""
        if self._call is not None:
            self._call.started = True

    def stepped(self, seconds: float, *, changed: bool) -> None:
        """A step of the batch took so long; `changed` says that rows had come or gone in it."""
        if (call := self._call) is not None:
            call.seconds += seconds
            call.steps += 1
            # The host waits for the device's work of one step in the next.
            call.settled += call.started
            if call.settled == 2:
                self._close()
        elif not changed:
            self._steps.append(seconds)

    def _close(self) -> None:
        call, self._call, step = self._call, None, self.step
        if call is None or not call.started or step is None:
            return
        key = call.tokens.bit_length()
        found = max(0.0, call.seconds - call.steps * step) / call.layers
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


class _Call:
    """A call that is under way, and the steps since it began."""

    def __init__(self, tokens: int, layers: int) -> None:
        self.tokens = tokens
        self.layers = layers
        self.seconds = 0.0
        self.steps = 0
        self.started = False
        self.settled = 0
