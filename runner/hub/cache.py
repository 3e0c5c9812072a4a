"""Where the Hugging Face hub's cache keeps what was downloaded. Read without its library, which takes 100 ms to import.

Layout (huggingface_hub's guide "Understand caching"): `models--org--name/refs/<revision>` holds a commit,
`models--org--name/snapshots/<commit>/` links to files in `models--org--name/blobs/`, which are named by content.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def hub_cache(env: Mapping[str, str]) -> Path:
    """The cache folder, as huggingface_hub chooses it."""
    if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := env.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = env.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def snapshot(cache: Path, repo: str, revision: str) -> Path | None:
    """The folder of a repository (`org/name`) at a branch, tag or commit, or None where it was not downloaded."""
    held = snapshot_folder(cache, repo, revision)
    return held if os.path.isdir(held) else None  # noqa: PTH112 - Path.is_dir raises where a name is too long


def snapshot_folder(cache: Path, repo: str, revision: str) -> Path:
    """Where a repository at a revision lies, or would: while nothing says which commit a name means, under the name."""
    folder = repository(cache, repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            read = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            read = ""
        commit = read if _COMMIT.fullmatch(read) else f"({revision})"
    return folder / "snapshots" / commit


def bytes_left(cache: Path, repo: str, revision: str) -> int | None:
    """How much of a repository's weights is still to be downloaded, by their index; None where that is not there."""
    held = snapshot_folder(cache, repo, revision)
    try:
        index = json.loads((held / "model.safetensors.index.json").read_bytes())
        total = int(index["metadata"]["total_size"])
        shards = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return max(0, total - sum(_size(held / shard) for shard in shards if isinstance(shard, str)))


def blobs_left(cache: Path, repo: str, blobs: Mapping[str, int]) -> int:
    """How many bytes of some blobs, by name with their sizes, are still to be downloaded."""
    folder = repository(cache, repo) / "blobs"
    return sum(size for name, size in blobs.items() if _size(folder / name) != size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def commit_of(folder: Path) -> str:
    """The commit of a snapshot's folder; empty of any other."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else ""


def listing_file(folder: Path) -> Path:
    """Where the hub's library keeps what a snapshot's commit holds, if it fetched of it (since its version 2)."""
    return folder.parents[1] / "trees" / f"{folder.name}.json"


def listed_files(path: Path) -> tuple[str, ...]:
    """The names in such a file; none where it says nothing that is understood."""
    try:
        return tuple(json.loads(path.read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def link_snapshot(folder: Path, commit: str, revision: str, files: Mapping[str, str]) -> None:
    """Show a commit in a repository's folder: `files` by name with the blobs that they are, all of them there. Raises
    OSError.

    A commit that is not there yet appears as a whole; of one that is, what belongs to other tools stays.
    """
    shown = folder / "snapshots" / commit
    beside = shown.with_name(f"{commit}.{os.getpid()}.incomplete")
    if shown.is_dir():
        _link(shown, files)
    else:
        beside.mkdir(parents=True, exist_ok=True)
        try:
            _link(beside, files)
            beside.rename(shown)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            if not shown.is_dir():
                raise
            _link(shown, files)  # somebody else was faster
    if not _COMMIT.fullmatch(revision):
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f".{ref.name}.{os.getpid()}")
        new.write_text(commit, encoding="ascii")
        new.replace(ref)


def _link(folder: Path, files: Mapping[str, str]) -> None:
    """Weights last: what looks whole is whole."""
    for name, blob in sorted(files.items(), key=lambda item: item[0].endswith(".safetensors")):
        target = Path("../../blobs") / blob
        path = folder / name
        if path.is_symlink() and path.readlink() == target:
            continue
        new = folder / f".{name}.{os.getpid()}"
        new.symlink_to(target)
        new.replace(path)


def is_offline(env: Mapping[str, str]) -> bool:
    """Whether the environment says that the hub is not to be asked."""
    said = (env.get("HF_HUB_OFFLINE") or env.get("TRANSFORMERS_OFFLINE") or "").upper()
    return said in ("1", "ON", "YES", "TRUE")


def repository(cache: Path, repo: str) -> Path:
    """The folder of a repository (`org/name`) in the cache."""
    return cache / f"models--{repo.replace('/', '--')}"
