"""A runner's end of an engine's socket, and the engine's process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runner.environment import prepared
from runner.protocol import EngineSpec, FromEngine, Loaded, Step, ToEngine, decoder_from_engine, encode_frame
from tests.engine.drive import Answer

ROOT = Path(__file__).parents[2]
PATIENCE = 100.0
"""Seconds that anything may take before a test fails."""

POLL = 0.005
"""Seconds between two looks at what cannot be waited for."""

_WITH = """
import sys, time
from runner.engine.command import serve
from runner.engine.environment import tokenise_in_one_thread
tokenise_in_one_thread()
sys.exit(serve(sys.argv[2:], time.monotonic(), int(sys.argv[1])))
"""
"""An engine that takes itself to have so many cores, with its command line behind."""

M = TypeVar("M")


class Client:
    """One connection. `frames` are all that have arrived."""

    def __init__(self, path: Path) -> None:
        self.frames: list[FromEngine] = []
        self.closed = False
        self._decoder = decoder_from_engine()
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline, "the engine never listened"
                time.sleep(POLL)
            else:
                return

    def send(self, *messages: ToEngine) -> None:
        """Write frames."""
        self.socket.sendall(b"".join(map(encode_frame, messages)))

    def receive(self, timeout: float = PATIENCE) -> bool:
        """Take in what arrives next. False on the end of the connection, and when nothing comes in time."""
        self.socket.settimeout(timeout)
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return False
        except ConnectionError:
            data = b""
        self.closed = not data
        self.frames += self._decoder.feed(data)
        return bool(data)

    def until(self, condition: Callable[[], Any]) -> None:
        """Receive until `condition` holds; fails after PATIENCE, or when the connection ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.frames[-5:]
            if not self.receive():
                assert condition(), self.frames[-5:]

    def wait(self, kind: type[M], **fields: Any) -> M:
        """The first frame of a type, with these fields, received or still to come."""

        def find() -> M | None:
            for frame in self.frames:
                if isinstance(frame, kind) and all(getattr(frame, name) == value for name, value in fields.items()):
                    return frame
            return None

        self.until(lambda: find() is not None)
        found = find()
        assert found is not None
        return found

    def answer(self, request_id: int) -> Answer:
        """What a request has got so far."""
        answer = Answer()
        for frame in self.frames:
            if isinstance(frame, Step):
                for delta in frame.deltas:
                    if delta.id == request_id:
                        answer.add(delta)
        return answer

    def finish(self, request_id: int) -> Answer:
        """Wait for a request's end."""
        self.until(lambda: self.answer(request_id).ends)
        return self.answer(request_id)

    def until_closed(self) -> None:
        """Wait for the end of the connection."""
        while self.receive():
            pass
        assert self.closed

    def close(self) -> None:
        """Leave."""
        self.socket.close()


class EngineChild:
    """An engine process, as the runner starts it."""

    def __init__(self, folder: Path, path: Path, cores: int | None = None, **fields: Any) -> None:
        """`cores` are those that it takes itself to have; `fields` are the spec's."""
        folder.mkdir(parents=True, exist_ok=True)
        self.clients: list[Client] = []
        self.socket = folder / "e.sock"
        self.log = folder / "log"
        spec = EngineSpec(**{"model": "tiny", "path": str(path), "digest": "d", "orphan_grace": PATIENCE, **fields})
        (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
        command = ["--spec", str(folder / "spec.json"), "--socket", str(self.socket)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(("-m", "runner.engine") if cores is None else ("-c", _WITH, str(cores))), *command],
                cwd=ROOT,
                env=prepared({**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}, time.monotonic()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def connect(self) -> Client:
        """A new connection, maybe before the model is loaded."""
        self.clients.append(Client(self.socket))
        return self.clients[-1]

    def ready(self) -> Client:
        """A new connection to the loaded model."""
        client = self.connect()
        client.wait(Loaded)
        return client

    def until_logged(self, message: str) -> None:
        """Wait for a line in its log."""
        deadline = time.monotonic() + PATIENCE
        while message not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(POLL)

    def exit_code(self) -> int:
        """Wait for the process to end by itself."""
        return self.process.wait(PATIENCE)


@contextmanager
def engine_child(folder: Path, path: Path, **fields: Any) -> Iterator[EngineChild]:
    """An engine process that is gone afterwards."""
    child = EngineChild(folder, path, **fields)
    try:
        yield child
    finally:
        for client in child.clients:
            client.close()
        child.process.kill()
        child.process.wait()
