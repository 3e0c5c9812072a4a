"""`NAME.lock.yaml` beside a manifest: which commit each source is, and what its files are.

The lock of `dev.yaml` is `dev.lock.yaml`; of several files that are merged, it is that of the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from runner.errors import Diagnostic, ManifestError
from runner.manifest.inputs import LOCK_BYTES, LOCK_SUFFIX, Inputs

VERSION: Final = 1
_HEAD: Final = (
    "# What the sources of {manifest} are, by `mlx-run lock`: keep it beside the manifest, under version control.\n"
    "# `mlx-run lock --check` says whether it holds, `mlx-run lock --upgrade` moves branches on.\n"
)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class LockedFile(NamedTuple):
    """`size` is bytes; `digest` is `sha256:HEX`, or `git:HEX` for the id that git gives a blob (as the hub lists)."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class LockedSource:
    """What one source is. `source` and `revision` are as in the manifest, `commit` is empty of a folder, `tokenizer` a
    digest of the files that turn text into tokens, empty of an adapter. `code`: its Python files are among `files`."""

    source: str
    revision: str | None = None
    commit: str = ""
    tokenizer: str = ""
    files: Mapping[str, LockedFile] = field(default_factory=dict)
    code: bool = False


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file that was read. `sources` are by their dotted path in the manifest, such as `models.chat.draft`."""

    path: Path
    sources: Mapping[str, LockedSource] = field(default_factory=dict)

    def pin(self, target: str, source: str, revision: str | None) -> LockedSource | None:
        """What a source is, None where the lock has nothing of it, or of another than the manifest asks for now."""
        held = self.sources.get(target)
        return held if held is not None and (held.source, held.revision) == (source, revision) else None


def lock_path(paths: Sequence[Path]) -> Path:
    """Where the lock of a manifest is, or would be."""
    return paths[-1].with_name(f"{paths[-1].stem}{LOCK_SUFFIX}")


def read_lock(paths: Sequence[Path], inputs: Inputs) -> Lock | None:
    """The lock of a manifest, noted in `inputs`; None where there is none. Raises ManifestError."""
    path = lock_path(paths)
    try:
        content = inputs.read(path.absolute())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    if len(content) > LOCK_BYTES:
        raise _wrong(path, f"is larger than {LOCK_BYTES // 2**20} MiB")
    try:
        data = yaml.load(content.decode(), _LOADER)  # noqa: S506 - a safe loader, in C where there is one
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError of a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
        raise _wrong(path, "cannot be parsed, perhaps since two versions of it were merged", line, column) from None
    try:
        if (version := data["version"]) != VERSION:
            other = f"version {version}" if isinstance(version, int) else "another version"
            raise _wrong(path, f"has {other}, and this mlx-run reads version {VERSION}")
        return Lock(path, {str(target): _source(entry) for target, entry in data["sources"].items()})
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise _wrong(path, "is not as `mlx-run lock` writes it") from None


def _wrong(path: Path, message: str, line: int = 0, column: int = 0) -> ManifestError:
    hint = "take it from version control again, or delete it and run `mlx-run lock`"
    return ManifestError([Diagnostic(str(path), line, column, "", message, hint, code="E811")])


def _source(entry: Any) -> LockedSource:
    revision, commit = entry.get("revision"), entry.get("commit", "")
    if not isinstance(entry["source"], str) or (commit and not re.fullmatch(r"[0-9a-f]{40}", commit)):
        raise ValueError
    files = {str(name): LockedFile(int(file["size"]), str(file["digest"])) for name, file in entry["files"].items()}
    if not all(re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", file.digest) for file in files.values()):
        raise ValueError
    tokenizer = str(entry.get("tokenizer", ""))
    code = entry.get("trust_remote_code", False) is True
    return LockedSource(entry["source"], None if revision is None else str(revision), commit, tokenizer, files, code)


def lock_text(manifest: str, sources: Mapping[str, LockedSource]) -> str:
    """The content of a lock file; the same for the same sources, so that its diffs are what has changed."""
    data: dict[str, Any] = {}
    for target, held in sources.items():
        entry: dict[str, Any] = {"source": held.source}
        if held.revision is not None:
            entry["revision"] = held.revision
        if held.commit:
            entry["commit"] = held.commit
        if held.code:
            entry["trust_remote_code"] = True
        if held.tokenizer:
            entry["tokenizer"] = held.tokenizer
        entry["files"] = {name: _Inline(held.files[name]._asdict()) for name in sorted(held.files)}
        data[target] = entry
    body = yaml.dump(
        {"version": VERSION, "sources": data}, Dumper=_Dumper, sort_keys=False, width=200, allow_unicode=True
    )
    return _HEAD.format(manifest=manifest) + body


class _Inline(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)
