"""Turns a manifest into the desired state, in a process of its own that rests when nothing is edited.

Validation needs pydantic and YAML: 12 MB that the runner would hold for ever, and 130 ms that its start would take one
after the other with the HTTP server's imports. Apart, both start at the same time, a large manifest holds up no stream,
and an idle runner is small. For the same reason nothing is imported here that starting the process does not need.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

from runner.errors import RunnerError
from runner.processes import python_module

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedRWPair
    from pathlib import Path

    from runner.control.compiled import Compiled
    from runner.manifest.drift import Changes


class Compiler:
    """The runner's end. Calls block (the caller is a thread, or has nothing else to do) and are serialised."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: BufferedRWPair | None = None
        self._digests: bytes | None = None

    def start(self) -> None:
        """Start the process if it rests, so that it is ready by the time it is needed."""
        with self._lock:
            self._start()

    def compile(
        self, paths: Sequence[Path], name: str | None = None, *, frozen: bool = False, changes: Changes | None = None
    ) -> Compiled:
        """Read, merge, check and resolve a manifest's files, and the changes that go over them; `frozen`: as its lock
        has them, or not at all. Raises RunnerError when the process fails."""
        with self._lock:
            stream = self._start()
            request = (tuple(paths), name, self._digests, frozen, *(() if changes is None else (changes,)))
            try:
                pickle.dump(request, stream)
                stream.flush()
                compiled: Compiled = pickle.load(stream)  # noqa: S301 - from our own child, over a pair of sockets
            except (EOFError, OSError, pickle.UnpicklingError):  # the last where its answer breaks off
                self._stop()
                raise RunnerError("the process that reads manifests ended; its output says why") from None
            self._digests = compiled.digests
            return compiled

    def stop(self) -> None:
        """End the process. The next call starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> BufferedRWPair:
        if self._stream is not None and self._process is not None and self._process.poll() is None:
            return self._stream
        self._stop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                python_module("runner.control.compile", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is the runner's to handle
                env={**os.environ, "PYDANTIC_DISABLE_PLUGINS": "__all__"},
            )
            self._stream = ours.makefile("rwb")
        return self._stream

    def _stop(self) -> None:
        if self._stream is not None:
            self._stream.close()  # the other side reads this as the end
            self._stream = None
        if self._process is not None:
            self._process.wait()
            self._process = None
