"""Stop strings: the text before the first of them comes out, and nothing of them, however tokens split them."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one row's text. Holds back an end that may be the beginning of a stop string.

    `matched` is the stop string that was found, "" while none was.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be sent now that `text` has come, and whether a stop string is complete."""
        if not self._stops:
            return text, False
        if not text:
            return "", False
        text = self._held + text
        found = [(index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self._held = ""
            index, self.matched = min(found)
            return text[:index], True
        keep = max(overlap(text, stop) for stop in self._stops)
        split = len(text) - keep
        self._held = text[split:]
        return text[:split], False

    def flush(self) -> str:
        """What was held back, when nothing more will come."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
