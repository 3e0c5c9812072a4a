"""Where a runner keeps its sockets, logs and generations: one folder a name, and the lock of its owner."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from runner.errors import AlreadyRunning, RunnerError

_SOCKET_PATH_LIMIT: Final = 100
"""Bytes. macOS allows 103 characters in a unix socket's path, Linux 107."""

_SHORT: Final = Path("/tmp")  # noqa: S108 - each runner has a folder of its own there, which is looked at


class StateFolder:
    """The paths of one runner. Creating the object creates the folders, mode 0700. Raises RunnerError where they cannot
    be made."""

    def __init__(self, root: Path, name: str, *, create: bool = True) -> None:
        self.name = name
        self.folder = root / name
        if create:
            self._make(self.folder, self.folder / "logs", self.folder / "e")

    @staticmethod
    def _make(*folders: Path) -> None:
        for folder in folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise RunnerError(
                    f"the state folder {folder} cannot be made: {error.strerror}",
                    hint="Mend it, or choose another place with MLX_RUN_STATE_DIR.",
                ) from None

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
    def generations(self) -> Path:
        """A file for each generation (`runner.control.generations`)."""
        return self.folder / "generations"

    @property
    def seal_key(self) -> Path:
        """What secrets are sealed with before they are kept (`runner.control.seal`)."""
        return self.folder / "seal.key"

    def engine_log(self, model: str) -> Path:
        """What a model's engine printed."""
        log = self.folder / "logs" / f"{model}.log"
        # A model may be called runner, or Runner where the file system takes that for the same.
        return log if model.lower() != self.log.stem else log.with_name(f"{model} (model).log")

    def rename_engine_logs(self, names: Mapping[str, str]) -> None:
        """Let the logs of models go on under new names, all at once: names may be swapped. What was logged under a new
        name before is kept beside it. Raises OSError."""
        moving = {new: self.engine_log(old).with_suffix(f".renamed-to-{new}") for old, new in names.items()}
        for old, new in names.items():
            with suppress(FileNotFoundError):
                self.engine_log(old).replace(moving[new])
        for new, path in moving.items():
            with suppress(FileNotFoundError):
                self.engine_log(new).replace(self.engine_log(new).with_suffix(".log.old"))
            with suppress(FileNotFoundError):
                path.replace(self.engine_log(new))

    def engine_spec(self, engine_id: str) -> Path:
        """The EngineSpec an engine was started with."""
        return self.folder / "e" / f"{engine_id}.json"

    def engines(self) -> list[str]:
        """Ids of the engines that were started and not seen to end."""
        return sorted(path.stem for path in (self.folder / "e").glob("*.json"))

    def engine_group(self, engine_id: str) -> Path:
        """Says where an engine's control group is (`runner.control.backstop`)."""
        return self.folder / "e" / f"{engine_id}.group"

    def engine_groups(self) -> list[str]:
        """Ids of the engines whose groups may not have been removed."""
        return sorted(path.stem for path in (self.folder / "e").glob("*.group"))

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
        # Imported here: a sixth of the time that `mlx-run status` takes, and hardly ever needed.
        import hashlib  # noqa: PLC0415

        # Both sides compute the same short place from the long one, so there is nothing to look up: whatever TMPDIR is,
        # which a service and a shell need not have in common.
        digest = hashlib.blake2b(os.fsencode(self.folder), digest_size=6).hexdigest()
        short = _SHORT / f"mlx-run-{os.getuid()}-{digest}"
        short.mkdir(mode=0o700, exist_ok=True)
        found = short.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
            raise RunnerError(
                f"{short} is not a folder of yours alone",
                hint="It is for sockets. Remove it, or choose a shorter place with MLX_RUN_STATE_DIR.",
            )
        return short / relative.replace("/", "-")

    def lock(self) -> RunnerLock:
        """Become this folder's runner. Raises AlreadyRunning."""
        return RunnerLock(self.folder / "runner.lock", self.name)


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
