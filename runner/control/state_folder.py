"""Where a runner keeps its sockets, logs and generations: one folder a name, and the lock of its owner."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from runner.errors import AlreadyRunning

_SOCKET_PATH_LIMIT: Final = 100
"""Bytes. macOS allows 103 characters in a unix socket's path, Linux 107."""


class StateFolder:
    """The paths of one runner. Creating the object creates the folders, mode 0700."""

    def __init__(self, root: Path, name: str, *, create: bool = True) -> None:
        self.name = name
        self.folder = root / name
        if create:
            for folder in (self.folder, self.folder / "logs", self.folder / "e"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def control_socket(self) -> Path:
        """Where `mlx-run status` and its like connect."""
        return self._socket("control.sock")

    @property
    def log(self) -> Path:
        """The runner's own log."""
        return self.folder / "logs" / "runner.log"

    @property
    def start_log(self) -> Path:
        """What a detached runner printed as it started."""
        return self.folder / "start.log"

    @property
    def generation_file(self) -> Path:
        """The last committed generation, JSON."""
        return self.folder / "generation.json"

    def engine_log(self, model: str) -> Path:
        """What a model's engine printed."""
        return self.folder / "logs" / f"{model}.log"

    def engine_spec(self, engine_id: str) -> Path:
        """The EngineSpec an engine was started with."""
        return self.folder / "e" / f"{engine_id}.json"

    def engines(self) -> list[str]:
        """Ids of the engines that were started and not seen to end."""
        return sorted(path.stem for path in (self.folder / "e").glob("*.json"))

    def forget_engine(self, engine_id: str) -> None:
        """Remove what an engine leaves behind."""
        self.engine_spec(engine_id).unlink(missing_ok=True)
        self.engine_socket(engine_id).unlink(missing_ok=True)

    def engine_socket(self, engine_id: str) -> Path:
        """Where an engine listens."""
        return self._socket(f"e/{engine_id}.sock")

    def _socket(self, relative: str) -> Path:
        path = self.folder / relative
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
            return path
        # Both sides compute the same short place from the long one, so there is nothing to look up.
        digest = hashlib.blake2b(os.fsencode(self.folder), digest_size=6).hexdigest()
        short = Path(tempfile.gettempdir()) / f"mlx-run-{os.getuid()}-{digest}"
        short.mkdir(mode=0o700, exist_ok=True)
        if short.stat().st_uid != os.getuid():
            raise PermissionError(f"{short} belongs to somebody else")
        return short / relative.replace("/", "-")

    def lock(self) -> RunnerLock:
        """Become this folder's runner. Raises AlreadyRunning."""
        return RunnerLock(self.folder / "runner.lock", self.name)

    def write_generation(self, generation: dict[str, Any]) -> None:
        """Replace the generation file, so that a crash leaves the old one or the new one."""
        write_atomically(self.generation_file, json.dumps(generation, indent=1).encode())

    def read_generation(self) -> dict[str, Any] | None:
        """The last committed generation, None before the first."""
        try:
            data: dict[str, Any] = json.loads(self.generation_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return data


class RunnerLock:
    """An exclusive lock that the kernel drops with its process, whatever ends it."""

    def __init__(self, path: Path, name: str) -> None:
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise AlreadyRunning(
                f"a runner named {name!r} is up already", hint=f"See it with `mlx-run status {name}`."
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())
        self._file.flush()

    def release(self) -> None:
        """Give the name back."""
        self._file.close()


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """write + fsync + rename + fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
