"""What stands for a secret in the state folder: a digest under a key that is in the same folder, and readable by its
owner alone. Equal secrets have equal seals, and a copy of the generations without the key tells nothing of them, not
even whether a guess is right."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Final

from runner.control.atomic import write_atomically

_KEY_BYTES: Final = 32


class Sealer:
    """Seals secrets with the key in a file, which is made when it is first needed (`create`)."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._create = create
        self._key: bytes | None = None

    def __call__(self, secret: str) -> str:
        """The seal of a secret. Without a key, as `create` may have it, one that equals no other."""
        if self._key is None:
            self._key = self._read()
        return hashlib.blake2b(secret.encode(), key=self._key, digest_size=16).hexdigest()

    def _read(self) -> bytes:
        try:
            key = self._path.read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) == _KEY_BYTES:
            return key
        key = secrets.token_bytes(_KEY_BYTES)  # gone or damaged: what was sealed with it matches nothing any more
        if self._create:
            write_atomically(self._path, key)
        return key


def available(sources: tuple[str, ...]) -> list[str]:
    """The secrets that can be had from where keys came from (`ListenerSpec.api_key_sources`)."""
    found = []
    for source in sources:
        kind, _, name = source.partition(":")
        if kind == "variable" and name in os.environ:
            found.append(os.environ[name])
        elif kind == "file":
            try:
                found.append(Path(name).read_text().rstrip("\r\n"))
            except (OSError, ValueError):
                continue
    return found
