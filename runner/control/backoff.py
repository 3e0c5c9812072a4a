"""Exponential backoff that forgets after a stable while, as Kubernetes does for crashing containers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next try. All figures are seconds; the caller brings the clock.

    The first failure waits `initial`, each further one twice as long up to `maximum`. A start that lasted `stable`
    seconds makes the next failure the first again.
    """

    initial: float = 0.25
    maximum: float = 30.0
    stable: float = 60.0
    failures: int = 0
    started_at: float | None = None

    def started(self, now: float) -> None:
        """It is up, as of `now`."""
        self.started_at = now

    def failed(self, now: float) -> float:
        """It is down (again). Returns how long to wait."""
        if self.started_at is not None and now - self.started_at >= self.stable:
            self.failures = 0
        self.started_at = None
        delay: float = min(self.initial * 2.0**self.failures, self.maximum)
        self.failures = min(self.failures + 1, 32)
        return delay
