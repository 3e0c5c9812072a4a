"""What `apply --json` prints: events as they come, and one line of type `result`. Standard library only."""

from __future__ import annotations

import json
import time
from typing import Any

from runner.errors import ManifestError, MlxRunError

Plan = dict[str, Any]


class JsonView:
    """Takes the place of `runner.cli.view.View`: each event is a line, and how it ended is one too."""

    def __init__(self, began: float) -> None:
        """`began` is when the command did, by `time.monotonic`."""
        self._began = began
        self._plan: Plan | None = None
        self._ended = False

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        """A command that ends without a result says why; one that has given its result goes on in silence."""
        if isinstance(value, MlxRunError):
            self.failed(value)

    def show(self, event: dict[str, Any]) -> None:
        """Print an event; the first that ends an apply is followed by the result."""
        if "event" not in event:
            return
        print_line(event)
        if event["event"] == "planned":
            self._plan = event["plan"]
        elif event["event"] in ("applied", "unchanged") and not self._ended:
            self._ended = True
            seconds = round(time.monotonic() - self._began, 3)
            changed = event["event"] == "applied"
            print_result(plan=self._plan, changed=changed, generation=event["generation"], seconds=seconds)

    def left(self) -> None:
        """Nobody waits for the end."""
        if not self._ended:
            self._ended = True
            print_result(plan=self._plan, changed=None)

    def failed(self, error: MlxRunError) -> None:
        """Print the result of an apply that came to nothing."""
        if not self._ended:
            self._ended = True
            print_line({"event": "result", "time": round(time.time(), 3), "ok": False, "error": _error(error)})

    def summary(self, name: str) -> None:
        """Nothing: the result has been said."""


def print_result(
    *, plan: Plan | None, changed: bool | None, generation: int | None = None, seconds: float | None = None
) -> None:
    """The result line of an apply that succeeded, or was not to be seen through (`changed` None)."""
    fields = {"changed": changed, "generation": generation, "seconds": seconds, "plan": plan}
    print_line({"event": "result", "time": round(time.time(), 3), "ok": True, **fields})


def _error(error: MlxRunError) -> dict[str, Any]:
    data: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, ManifestError):
        data["diagnostics"] = [d._asdict() for d in error.diagnostics]
    return data


def print_line(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
