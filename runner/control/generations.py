"""What was applied: one file a generation, in a folder that nobody watches. Standard library only, for `mlx-run
history`.

A file is two lines of JSON: the header, which says what happened and how long the second line is, and the body, which
has the plan and the desired state (`runner.plan.stored`: no secrets). A file is written once, beside its place, and
renamed to it before anything is switched over: whatever ends a runner, the last good generation can be read. What is
damaged, or was not written by us, is passed over and said.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.control.atomic import write_atomically

KEPT: Final = 100
"""Generations that are kept; the current one always is."""

_FORMAT: Final = 1
_MAX_HEADER_BYTES: Final = 256 * 1024
_ACTIONS_SHOWN: Final = 24
_END_OF_TIME: Final = 1e11
"""Seconds since the epoch: a time beyond is none of ours, and no calendar has it."""

Body = dict[str, Any]
"""`plan` (`runner.plan.render.plan_json`) and `spec` (`runner.plan.stored.stored_form`)."""


class BadGeneration(Exception):  # noqa: N818 - says what a file is, and never leaves this package
    """A file that is no whole generation."""


class Generation(NamedTuple):
    """The header of a generation. `time` is seconds since the epoch, `seconds` how long executing its plan took.

    `digest` is the desired state's. `via` is start, apply, watch, rollback or api, and `user` who did that. `error`
    says why a failed one failed; it was never current. `actions` are (verb, target) of the plan's first, of
    `action_count`.

    `manifest` are the files, `seen` stands for their contents and whatever else they came to. A rollback has the number
    it went back to in `restores` and the last number that came from the manifest in `manifest_generation`: as long as
    the manifest still is as it was `seen`, the rollback holds.
    """

    number: int
    time: float
    digest: str
    via: str
    user: str
    manifest: tuple[str, ...] = ()
    seen: str = ""
    error: str = ""
    attempts: int = 1
    seconds: float = 0.0
    actions: tuple[tuple[str, str], ...] = ()
    action_count: int = 0
    restores: int = 0
    manifest_generation: int = 0

    @property
    def ok(self) -> bool:
        """Whether it went live."""
        return not self.error


class Generations:
    """The folder of one runner's generations. One process writes (the runner, which has the lock), any may read.

    `on_damage` is told of each file that is passed over, once: its path and what is wrong with it.
    """

    def __init__(self, folder: Path, on_damage: Callable[[Path, str], None], kept: int = KEPT) -> None:
        self.folder = folder
        self._on_damage = on_damage
        self._kept = kept
        self._told: set[Path] = set()

    def all(self) -> list[Generation]:
        """Every readable generation, oldest first."""
        return [header for header in map(self._header_or_none, self._paths()) if header is not None]

    def current(self) -> Generation | None:
        """The last one that went live, None before the first."""
        newest_first = map(self._header_or_none, reversed(self._paths()))
        return next((header for header in newest_first if header is not None and header.ok), None)

    def find(self, number: int) -> Generation | None:
        """The generation of that number, None where there is none that can be read."""
        path = self._path(number)
        return self._header_or_none(path) if path.exists() else None

    def before(self, number: int) -> Generation | None:
        """The last one that went live before `number`."""
        earlier = [header for header in self.all() if header.ok and header.number < number]
        return earlier[-1] if earlier else None

    def body(self, number: int) -> Body:
        """What a generation was. Raises BadGeneration where there is none, or it is damaged."""
        try:
            with self._path(number).open("rb") as file:
                header = _json_line(file.readline(_MAX_HEADER_BYTES))
                body = file.read()
        except OSError as error:
            raise BadGeneration(f"it cannot be read: {error.strerror}") from None
        if zlib.crc32(body) != header.get("body_crc"):
            raise BadGeneration("its content is not what was written")
        return _json_line(body)

    def next_number(self) -> int:
        """A number that no file has or had, readable or not."""
        return max((int(path.stem) for path in self._paths()), default=0) + 1

    def write(self, header: Generation, body: Body) -> None:
        """Keep a generation, and forget the oldest ones. Raises OSError; then nothing has changed."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        encoded = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        first = {
            "format": _FORMAT,
            "body_bytes": len(encoded),
            "body_crc": zlib.crc32(encoded),
            **header._asdict(),
            "actions": header.actions[:_ACTIONS_SHOWN],
        }
        write_atomically(self._path(header.number), json.dumps(first).encode() + b"\n" + encoded)
        self._prune()

    def _prune(self) -> None:
        for leftover in self.folder.glob(".????????.json.*"):  # of a runner that was killed while it wrote
            _remove(leftover)
        current = self.current()
        for path in self._paths()[: -self._kept]:
            if current is None or path != self._path(current.number):
                _remove(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.json"

    def _paths(self) -> list[Path]:
        """The files that are named as generations are, by number."""
        return sorted(path for path in self.folder.glob("*.json") if re.fullmatch("[0-9]{8}", path.stem))

    def _header_or_none(self, path: Path) -> Generation | None:
        try:
            return _read_header(path)
        except BadGeneration as error:
            if path not in self._told:
                self._told.add(path)
                self._on_damage(path, str(error))
            return None


def _remove(path: Path) -> None:
    with suppress(OSError):  # what was to be written is, whatever cannot be removed
        path.unlink()


def _read_header(path: Path) -> Generation:
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER_BYTES)
            size = path.stat().st_size
    except OSError as error:
        raise BadGeneration(f"it cannot be read: {error.strerror}") from None
    data = _json_line(line)
    if data.get("format") != _FORMAT:
        raise BadGeneration(f"it has format {data.get('format')!r}, this version reads {_FORMAT}")
    if size != len(line) + _field(data, "body_bytes", 0):
        raise BadGeneration(f"it has {size} bytes where it should have {len(line) + data['body_bytes']}")
    required = {"time": 0.0, "number": 0, "digest": "", "via": "", "user": ""}
    given = {name: _field(data, name, kind) for name, kind in {**required, **Generation._field_defaults}.items()}
    given["manifest"] = tuple(map(str, given["manifest"]))
    given["actions"] = tuple((str(action[0]), str(action[1])) for action in given["actions"])
    header = Generation(**given)
    if header.number != int(path.stem):
        raise BadGeneration(f"it is generation {header.number} under another's name")
    return header


def _field(data: dict[str, Any], name: str, like: Any) -> Any:
    """A field of the header, of the same type as `like`; tuples are lists of texts, or of pairs of them."""
    value = data.get(name)
    wanted = list if isinstance(like, tuple) else int | float if isinstance(like, float) else type(like)
    good = isinstance(value, wanted) and not isinstance(value, bool)
    if good and isinstance(value, int | float) and name == "time":
        good = 0 <= value < _END_OF_TIME
    if good and isinstance(value, list) and name == "actions":
        good = all(isinstance(item, list) and len(item) == 2 for item in value)
    if not good:
        raise BadGeneration(f"its {name} is {value!r}, which is none")
    return value


def _json_line(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise BadGeneration("it ends in the middle")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise BadGeneration("it is not JSON") from None
    if not isinstance(data, dict):
        raise BadGeneration("it is not a JSON object")
    return data


def shown_actions(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(verb, target) of each action of a plan in its JSON form."""
    return ((action["action"], action["target"]) for action in plan["actions"])
