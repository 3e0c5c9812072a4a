"""Turns a manifest into the desired state, in a process of its own that rests when nothing is edited.

Validation needs pydantic and YAML: 12 MB that the runner would hold for ever, and some 100 ms that its start would take
one after the other with the HTTP server's imports. Apart, both start at the same time, a large manifest holds up no
stream, and an idle runner is small.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import Diagnostic, ManifestError, NotDownloaded, RunnerError
from runner.options import Options
from runner.plan.spec import Desired

if TYPE_CHECKING:
    from runner.plan.digests import DigestCache


@dataclass(frozen=True, slots=True)
class Request:
    """Compile `path`. `name`, where given, is the only name that the manifest may have.

    `digests` is what was read before, for the process keeps nothing between two lives.
    """

    path: Path
    name: str | None
    digests: DigestCache | None


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a manifest: `desired`, or what is wrong with it.

    `name` and `files` (the manifest, its secrets, its local models and adapters, there or not) are known once the
    manifest itself is sound, else "" and (). `missing` is a hub repository and revision to download first.
    """

    path: Path
    name: str = ""
    files: tuple[Path, ...] = ()
    desired: Desired | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    missing: tuple[str, str] | None = None
    options: Options | None = None
    digests: DigestCache | None = None

    def error(self) -> ManifestError | None:
        """What is wrong, None when nothing is."""
        if not self.diagnostics:
            return None
        if self.missing is not None:
            return NotDownloaded(list(self.diagnostics), *self.missing)
        return ManifestError(list(self.diagnostics))


class Compiler:
    """The runner's end. Calls block (the caller is a thread, or has nothing else to do) and are serialised."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._digests: DigestCache | None = None

    def start(self) -> None:
        """Start the process if it rests, so that it is ready by the time it is needed."""
        with self._lock:
            self._start()

    def compile(self, path: Path, name: str | None = None) -> Compiled:
        """Read, check and resolve a manifest. Raises RunnerError when the process fails."""
        with self._lock:
            connection = self._start()
            try:
                connection.send(Request(path, name, self._digests))
                compiled: Compiled = connection.recv()
            except (EOFError, OSError):
                self._stop()
                raise RunnerError("the process that reads manifests ended; its output says why") from None
            self._digests = compiled.digests
            return compiled

    def stop(self) -> None:
        """End the process. The next call starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> Connection[Any, Any]:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self._stop()
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.control.compile", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is the runner's to handle
        )
        theirs.close()
        self._connection = ours
        return ours

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the other side reads this as the end
            self._connection = None
        if self._process is not None:
            self._process.wait()
            self._process = None
