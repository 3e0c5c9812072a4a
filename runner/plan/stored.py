"""A desired state as plain data that can be kept, and back again. What is kept never has the value of a secret.

An API key is kept as what `seal` makes of it (a keyed digest) beside where it came from; whoever reads it back brings
the values, and gets those whose seal is the same. Everything else is JSON of the specs' own fields, so that a field
that is added to them with a default is kept and read without a change here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from runner.plan.spec import Desired

Seal = Callable[[str], str]
"""A digest of a secret that only the owner of a key can make."""

Stored = dict[str, Any]


class NotReadable(Exception):  # noqa: N818 - says what a stored spec is; callers turn it into an error of the tree
    """This is not a stored spec that this version understands."""


class SealedAway(Exception):  # noqa: N818
    """A stored spec needs secrets that nobody brought: (listener, where the key came from) for each."""

    def __init__(self, missing: tuple[tuple[str, str], ...]) -> None:
        super().__init__(f"{len(missing)} secrets are missing")
        self.missing = missing


def stored_form(desired: Desired, seal: Seal) -> Stored:
    """`desired` as JSON's types, secrets sealed."""
    data: Stored = msgspec.to_builtins(desired, enc_hook=str)
    for listener in data["listeners"]:
        sources = [*listener.pop("api_key_sources"), *[""] * len(listener["api_keys"])]
        listener["api_keys"] = [
            {"seal": seal(key), "source": source} for key, source in zip(listener["api_keys"], sources, strict=False)
        ]
    return data


def stored_digest(stored: Stored) -> str:
    """Same value, same desired state. Where a secret came from does not count."""
    plain = {**stored, "listeners": [_without_sources(listener) for listener in stored["listeners"]]}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _without_sources(listener: dict[str, Any]) -> dict[str, Any]:
    return {**listener, "api_keys": [key["seal"] for key in listener["api_keys"]]}


def key_sources(stored: Stored) -> tuple[str, ...]:
    """Where the keys of a stored spec came from, as in `ListenerSpec.api_key_sources`, each once. Raises
    NotReadable."""
    try:
        found = [key["source"] for listener in stored["listeners"] for key in listener["api_keys"]]
    except (KeyError, TypeError) as error:
        raise NotReadable(f"it has no {error}") from None
    return tuple(dict.fromkeys(str(source) for source in found))


def from_stored(stored: Stored, seal: Seal, known: Iterable[str]) -> Desired:
    """The desired state that was stored; `known` are secrets that its seals are compared with.

    Raises SealedAway where one is not among them, and NotReadable.
    """
    values = {seal(secret): secret for secret in known}
    return _read(stored, values, strict=True)


def to_compare(stored: Stored, seal: Seal, known: Iterable[str]) -> Desired:
    """Like `from_stored`, to be compared and not to be served: a secret that nobody brought is its seal, and so equal
    to none. Raises NotReadable."""
    values = {seal(secret): secret for secret in known}
    return _read(stored, values, strict=False)


def _read(stored: Stored, values: dict[str, str], *, strict: bool) -> Desired:
    missing: list[tuple[str, str]] = []
    try:
        listeners = []
        for listener in stored["listeners"]:
            keys = listener["api_keys"]
            missing += [(str(listener["name"]), str(key["source"])) for key in keys if key["seal"] not in values]
            found = [values.get(key["seal"], key["seal"]) for key in keys]
            sources = [key["source"] for key in keys]
            listeners.append({**listener, "api_keys": found, "api_key_sources": sources})
        data = {**stored, "listeners": listeners}
        desired = msgspec.convert(data, Desired, dec_hook=_decode)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise NotReadable(str(error)) from None
    if missing and strict:
        raise SealedAway(tuple(missing))
    return desired


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"no {kind.__name__} can be made of {value!r}")
