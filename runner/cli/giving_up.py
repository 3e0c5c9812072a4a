"""Ctrl-C while a runner works on what this command asked for: it is told to undo that, and its answer is waited for."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from runner.control import client
from runner.errors import Interrupted, MlxRunError


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt at the end, and not within."""
    if threading.current_thread() is not threading.main_thread():  # nobody else may handle signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class GivingUp:
    """While it is entered, the first SIGINT or SIGTERM sends a request to the runner, and the next ends this process.

    An error that comes after the first is an Interrupted, whatever else it was.
    """

    def __init__(self, socket: Path, op: str, says: str, **fields: Any) -> None:
        """`says` is printed, to standard error, when it is sent."""
        self._socket, self._op, self._says, self._fields = socket, op, says, fields
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GivingUp:
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._asked and isinstance(value, MlxRunError):
            raise Interrupted(value.message, hint=value.hint) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print(f"\n{self._says}", file=sys.stderr, flush=True)
        try:
            client.request(self._socket, self._op, timeout=5.0, **self._fields)
        except MlxRunError:
            return  # it is gone, or is over it: the answer that is waited for says so
