"""The engine's socket: one thread reads, one writes, and the main thread sees two queues.

The writing thread waits for the interpreter's lock: a frame leaves when the next step's graph is built, 1.5 ms after it
was there, and the main thread waits for the lock in its turn, when it comes back from the device
(tests/bench/transport_cost.py). So it writes frames itself, unless cores are few: the runner that it wakes may take its
core then (at 1 row, on a machine of two cores, that was 13 % of the rate). There it writes those for which that costs
more than a token's time: in which an answer begins or ends. What a full socket does not take is left to the thread.

One runner is connected at a time; a newer connection replaces an older. What the main thread sends belongs to the
connection whose `Connected` event it took last, so nothing of a replaced runner's requests reaches the new one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import msgspec

from runner.engine import environment
from runner.protocol import FrameDecoder, FromEngine, Step, ToEngine, decoder_to_engine, encode_frame

logger = logging.getLogger(__name__)

MAX_UNSENT: Final = 64 * 1024 * 1024
"""Bytes. A runner that leaves more than this unread is disconnected."""

_CHUNK: Final = 256 * 1024


class Connected(msgspec.Struct, frozen=True):
    """A runner has connected, and has been greeted. Whatever follows in the inbox is its."""

    connection: int


class Disconnected(msgspec.Struct, frozen=True):
    """The runner of `connection` is gone, or was replaced."""

    connection: int


class Woken(msgspec.Struct, frozen=True):
    """There is something to look at that came from none of the runners: work for the engine, or a signal."""


Event = Connected | Disconnected | Woken | ToEngine


class Transport:
    """A listening unix socket and its queues. `inbox` is for one thread to get from."""

    def __init__(self, path: Path) -> None:
        """Binds `path`, mode 0600, replacing a stale socket. Raises OSError when it cannot be bound."""
        self.inbox: SimpleQueue[Event] = SimpleQueue()
        self._waits: SimpleQueue[Any] = self.inbox
        self._path = path
        self._outbox: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._lock = threading.RLock()
        self._greeting: tuple[FromEngine, ...] = ()
        self._peer: socket.socket | None = None
        self._connection = 0
        self._answering = 0
        self._unsent = 0
        self._all_at_once = environment.cores() >= environment.MANY_CORES
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        except OSError:
            self._listener.close()
            raise
        finally:
            os.umask(previous)
        self._closing, self._close = socket.socketpair()
        self._signals = False
        self._reader = threading.Thread(target=self._read_loop, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_loop, name="engine-writer", daemon=True)

    def start(self, *greeting: FromEngine) -> None:
        """Accept runners from now on; each is sent `greeting` first."""
        self._greeting = greeting
        self._listener.listen(4)
        self._reader.start()
        self._writer.start()

    def answer(self, connection: int) -> None:
        """From now on `send` goes to `connection`: the main thread has taken its `Connected` event."""
        self._answering = connection

    def send(self, message: FromEngine) -> None:
        """Write a frame for the runner that is being answered; queue it where cores are few and nobody waits for it."""
        self._enqueue(self._answering, encode_frame(message), at_once=self._all_at_once or _awaited(message))

    def greet(self, *greeting: FromEngine) -> None:
        """What runners that connect from now on are sent first."""
        with self._lock:
            self._greeting = greeting

    def announce(self, message: FromEngine, *greeting: FromEngine) -> None:
        """Send `message` to whoever is connected, and greet later runners with `greeting`: each sees one of them."""
        with self._lock:
            self._greeting = greeting
            self._enqueue(self._connection, encode_frame(message))

    def wake_on_signals(self, waits: SimpleQueue[Any]) -> None:
        """Have signals put a `Woken` into the queue that the main thread waits for. Called by the main thread.

        One that arrives just before that would else be handled by nobody: its handler runs when the main thread goes
        on, and what it waits in is not interrupted by what came before.
        """
        self._waits = waits
        self._close.setblocking(False)
        signal.set_wakeup_fd(self._close.fileno(), warn_on_full_buffer=False)
        self._signals = True

    def close(self, timeout: float) -> None:
        """Write what is queued, for at most `timeout` seconds, then close and remove the socket."""
        if self._signals:
            signal.set_wakeup_fd(-1)
        self._outbox.put(None)
        self._writer.join(timeout)
        self._path.unlink(missing_ok=True)
        self._close.close()
        self._reader.join(timeout)

    # ------------------------------------------------------------- the two threads

    def _read_loop(self) -> None:
        decoder = decoder_to_engine()
        with self._closing, self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._closing, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._closing:
                        if self._closing.recv(64):
                            self._waits.put(Woken())  # a signal
                            continue
                        self._hang_up()
                        return
                    if key.fileobj is self._listener:
                        decoder = decoder_to_engine()
                        self._accept(selector)
                    elif key.fileobj is self._peer and not self._receive(decoder):
                        selector.unregister(key.fileobj)
                        self._hang_up()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        peer, _ = self._listener.accept()
        if self._peer is not None:
            selector.unregister(self._peer)
            self._hang_up()
        selector.register(peer, selectors.EVENT_READ)
        with self._lock:
            self._connection += 1
            self._peer = peer
            for message in self._greeting:
                self._enqueue(self._connection, encode_frame(message))
            self.inbox.put(Connected(self._connection))

    def _receive(self, decoder: FrameDecoder[ToEngine]) -> bool:
        """Put what has arrived into the inbox. False when the connection is of no more use."""
        assert self._peer is not None
        try:
            data = self._peer.recv(_CHUNK)
            messages = decoder.feed(data)
        except OSError:
            return False
        except (ValueError, msgspec.DecodeError) as error:
            logger.error("runner sent what does not decode", extra={"error": str(error)})
            return False
        for message in messages:
            self.inbox.put(message)
        return bool(data)

    def _hang_up(self) -> None:
        with self._lock:
            peer, self._peer = self._peer, None
            connection = self._connection
        if peer is not None:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # wakes a writer that waits on a full buffer
            peer.close()
            self.inbox.put(Disconnected(connection))

    def _enqueue(self, connection: int, frame: bytes, *, at_once: bool = False) -> None:
        with self._lock:
            if at_once and not self._unsent:
                frame = self._write_now(connection, frame)
                if not frame:
                    return
            self._unsent += len(frame)
            self._outbox.put((connection, frame))
            if self._unsent > MAX_UNSENT and self._peer is not None:
                logger.error("runner does not read its frames", extra={"unsent_bytes": self._unsent})
                with contextlib.suppress(OSError):
                    self._peer.shutdown(socket.SHUT_RDWR)

    def _write_now(self, connection: int, frame: bytes) -> bytes:
        """What the socket has not taken; nothing of a frame for a runner that is gone.

        Called when nothing is queued, and with the lock, which keeps the socket open.
        """
        if self._peer is None or connection != self._connection:
            return b""
        try:
            return frame[self._peer.send(frame, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return frame
        except OSError:  # the reader sees the end of the connection and reports it
            return b""

    def _write_loop(self) -> None:
        while (item := self._outbox.get()) is not None:
            connection, frame = item
            with self._lock:
                peer = self._peer if connection == self._connection else None
            if peer is not None:
                with contextlib.suppress(OSError):  # the reader sees the end of the connection and reports it
                    peer.sendall(frame)
            with self._lock:  # not before it is written: the main thread would overtake it
                self._unsent -= len(frame)


def _awaited(message: FromEngine) -> bool:
    """Whether an answer begins or ends with it: those deltas have usage."""
    return isinstance(message, Step) and any(delta.usage is not None for delta in message.deltas)
