"""The engine process: loads its model, then serves whoever is connected until told to stop, or left alone.

The main thread owns everything of MLX. It takes events from the transport's inbox (waiting for one when there is
nothing to compute) and steps the engine. Where there are cores for it, a thread is in between that reads requests.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import msgspec

from runner.engine import environment
from runner.engine.arrivals import Arrivals, Arrived
from runner.engine.prepared import Prepared
from runner.engine.reading import SWITCH, Reading
from runner.engine.transport import Connected, Disconnected, Transport, Woken
from runner.errors import EngineDied, EngineLoadError
from runner.protocol import (
    VERSION,
    AdapterDropped,
    AdapterRefused,
    AdapterSource,
    Cancel,
    Configure,
    DropAdapter,
    EngineSpec,
    FromEngine,
    Generate,
    Hello,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Loading,
    Overrun,
    Shutdown,
    Stats,
)

if TYPE_CHECKING:
    from runner.engine.loop import Engine
    from runner.engine.watchdog import Watchdog

logger = logging.getLogger(__name__)

_STATS_INTERVAL: Final = 0.5
_WATCH_INTERVAL: Final = 0.1
_FLUSH_TIMEOUT: Final = 2.0
"""Seconds that frames under way get when the process ends."""


class EngineProcess:
    """One model's engine behind one socket."""

    def __init__(self, spec: EngineSpec, transport: Transport, started: float, cores: int | None = None) -> None:
        """`started` is when the process began, by `time.monotonic`. It has `cores`, None for all it may run on."""
        self._spec = spec
        self._transport = transport
        cores = environment.cores() if cores is None else cores
        self._reading = Reading(transport.inbox) if cores >= environment.MANY_CORES else None
        self._inbox: SimpleQueue[Any] = transport.inbox if self._reading is None else self._reading.events
        self._arrivals = Arrivals(self._inbox) if self._reading is None else Arrivals(self._inbox, self._reading.behind)
        self._dropped = 0
        self._started = started
        self._loaded: Loaded | None = None
        self._connected = False
        self._stop_at: float | None = None
        self._orphaned_at = started
        self._stats_at = 0.0
        self._stats: Stats | None = None
        self._watched_at = 0.0
        self._rests_at: float | None = None

    def run(self) -> int:
        """Load, serve, and return the exit code: 0, 1 when the model cannot be loaded, 3 when it cannot go on."""
        try:
            self._transport.start(self._hello(), Loading("importing"))
            try:
                engine, watchdog = self._load()
            except EngineLoadError as error:
                logger.error("model cannot be loaded", extra={"reason": error.message})
                self._tell_failure(LoadFailed(error.message, error.hint))
                return 1
            except Exception as error:
                logger.exception("loading failed")
                self._tell_failure(LoadFailed(f"loading failed: {type(error).__name__}: {error}"))
                return 1
            self._serve(engine, watchdog)
            return 0
        except EngineDied as error:
            logger.error("engine cannot go on", extra={"reason": error.message})
            return 3
        finally:
            self._transport.close(_FLUSH_TIMEOUT)
            if self._reading is not None:
                self._reading.close(_FLUSH_TIMEOUT)

    def _tell_failure(self, failed: LoadFailed) -> None:
        """Returns once somebody is connected, and so has been told, or the grace is over."""
        self._transport.announce(failed, self._hello(), failed)
        with contextlib.suppress(Empty):
            self._transport.inbox.get(timeout=self._spec.orphan_grace)

    # ------------------------------------------------------------- loading

    def _load(self) -> tuple[Engine, Watchdog]:
        # Imported here, with MLX: the socket is there, and the runner connected, while this takes its time.
        from runner.engine.startup import start  # noqa: PLC0415

        transport = self._transport
        ready = start(self._spec, self._started, self._stage, transport.send, lambda: self._inbox.put(Woken()))
        self._loaded = ready.loaded
        gc.freeze()  # what is here now stays: no collection looks through it
        gc.enable()
        transport.announce(ready.loaded, *self._greeting(ready.engine))
        logger.info("engine ready", extra={"model": self._spec.model, "seconds": round(ready.loaded.seconds, 3)})
        return ready.engine, ready.watchdog

    def _stage(self, stage: str) -> None:
        self._transport.announce(Loading(stage), self._hello(), Loading(stage))

    def _hello(self, adapters: list[str] | None = None) -> Hello:
        return Hello(
            VERSION, os.getpid(), self._spec.model, self._spec.digest, self._loaded is not None, adapters or []
        )

    def _greeting(self, engine: Engine) -> tuple[FromEngine, ...]:
        """What a runner that connects from now on learns at once."""
        assert self._loaded is not None
        return (self._hello(engine.adapters), self._loaded)

    # ------------------------------------------------------------- serving

    def _serve(self, engine: Engine, watchdog: Watchdog) -> None:
        # Until now there was nothing to finish, and a SIGTERM ended the process as it always does.
        signal.signal(signal.SIGTERM, lambda *_: self._transport.inbox.put(Shutdown(0.0)))
        self._transport.wake_on_signals(self._inbox)
        if self._reading is not None:
            sys.setswitchinterval(SWITCH)
            self._reading.start(engine.intake, engine.limits)
        self._orphaned_at = time.monotonic()
        while True:
            for event in self._arrivals.take(busy=engine.busy, patience=self._patience):
                self._handle(engine, event)
            self._count_dropped(engine)
            if self._must_stop(engine):
                return
            if engine.busy:
                engine.step()
                self._rests_at = time.monotonic() + watchdog.rests_after
            self._watch(engine, watchdog)
            self._report(engine)

    def _count_dropped(self, engine: Engine) -> None:
        """Tell of requests that were cancelled before the engine had them."""
        dropped = self._arrivals.dropped + (0 if self._reading is None else self._reading.dropped)
        engine.count_cancelled(dropped - self._dropped)
        self._dropped = dropped

    def _watch(self, engine: Engine, watchdog: Watchdog) -> None:
        """Look at what is really in use, now and then. Raises EngineDied where only a new process helps."""
        now = time.monotonic()
        if self._rests_at is not None and now >= self._rests_at:
            watchdog.rest()
            self._rests_at = None
        if now < self._watched_at + _WATCH_INTERVAL and engine.busy:
            return
        self._watched_at = now
        goes_on = watchdog.look(busy=engine.busy)
        engine.room.closed = watchdog.closed
        if not goes_on:
            used, most = watchdog.over, engine.budget.most
            reason = f"it used {used:,} bytes, and its limit is {most:,}"
            self._transport.send(Overrun(used, most))
            engine.fail_all(f"the engine starts again: {reason}")
            raise EngineDied(reason)

    def _patience(self) -> float | None:
        """Seconds to wait for an event, None for as long as it takes."""
        ends = []
        if self._rests_at is not None:
            ends.append(self._rests_at)
        if self._stop_at is not None:
            ends.append(self._stop_at)
        elif not self._connected:
            ends.append(self._orphaned_at + self._spec.orphan_grace)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _must_stop(self, engine: Engine) -> bool:
        now = time.monotonic()
        if self._stop_at is not None and (not (engine.rows or self._arrivals.waiting) or now >= self._stop_at):
            engine.fail_all("the engine is shutting down")
            logger.info("engine stopped", extra={"model": self._spec.model})
            return True
        if not self._connected and now >= self._orphaned_at + self._spec.orphan_grace:
            logger.info("engine left alone", extra={"model": self._spec.model, "grace": self._spec.orphan_grace})
            return True
        return False

    def _handle(self, engine: Engine, event: Arrived) -> None:
        match event:
            case Prepared():
                engine.take(event)
            case Generate():
                engine.submit(event)
            case Cancel(id=request_id):
                engine.cancel(request_id)
            case LoadAdapter(adapter=adapter):
                self._load_adapter(engine, adapter)
            case DropAdapter(key=key):
                engine.drop_adapter(key)
                self._transport.greet(*self._greeting(engine))
                self._transport.send(AdapterDropped(key))
            case Configure():
                engine.configure(event)
                self._stats_at = 0.0  # who changes limits waits for what comes of it
            case Shutdown(deadline=deadline):
                engine.intake.draining = True
                stop_at = time.monotonic() + deadline
                self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            case Woken():
                pass  # the next step sees to it
            case Connected(connection=connection):
                self._connected = True
                self._transport.answer(connection)
                self._stats = None  # it has seen none yet
            case Disconnected():
                engine.cancel_all()
                self._connected = False
                self._orphaned_at = time.monotonic()

    def _load_adapter(self, engine: Engine, adapter: AdapterSource) -> None:
        try:
            loaded = engine.load_adapter(adapter)
        except EngineLoadError as refusal:
            self._transport.send(AdapterRefused(adapter.key, refusal.message))
        except Exception as error:
            # One adapter's oddity must not end the requests of all others.
            logger.exception("adapter could not be read", extra={"path": adapter.path})
            self._transport.send(AdapterRefused(adapter.key, f"{adapter.path} could not be read: {error}"))
        else:
            self._transport.greet(*self._greeting(engine))
            self._transport.send(loaded)

    def _report(self, engine: Engine) -> None:
        """Send the counters: twice a second while they change, and once more when there is nothing left to do."""
        now = time.monotonic()
        if engine.busy and now < self._stats_at + _STATS_INTERVAL:
            return
        stats = engine.stats()
        if stats != self._stats:
            self._transport.send(stats)
            self._stats, self._stats_at = stats, now


def read_spec(path: Path) -> EngineSpec:
    """The spec in a JSON file. Raises OSError and msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=EngineSpec)
