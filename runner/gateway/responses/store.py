"""Answers that may be built on: kept in memory, within bounds, the oldest given up first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import msgspec

MOST: Final = 1024
MOST_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """`response` as it was sent (JSON), the request's `items` (JSON), and the conversation up to and with it (JSON)."""

    response: bytes
    items: bytes
    turns: bytes

    @property
    def nbytes(self) -> int:
        """What keeping it takes."""
        return len(self.response) + len(self.items) + len(self.turns)


class ResponseStore:
    """One listener's answers. Not on disk: they are gone with the runner."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self.nbytes = 0
        self._most = most
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, response: dict[str, Any], items: list[dict[str, Any]], turns: list[dict[str, Any]]) -> None:
        """Keeps an answer; the oldest go until it has room. One that is too large by itself is not kept."""
        encode = msgspec.json.encode
        entry = Stored(encode(response), encode(items), encode(turns))
        if entry.nbytes > self._most_bytes:
            return
        self.drop(response["id"])
        self._entries[response["id"]] = entry
        self.nbytes += entry.nbytes
        while len(self._entries) > self._most or self.nbytes > self._most_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def get(self, response_id: str) -> Stored | None:
        """An answer, which becomes the youngest."""
        entry = self._entries.get(response_id)
        if entry is not None:
            self._entries.move_to_end(response_id)
        return entry

    def drop(self, response_id: str) -> bool:
        """Forgets an answer; whether there was one."""
        entry = self._entries.pop(response_id, None)
        if entry is None:
            return False
        self.nbytes -= entry.nbytes
        return True
