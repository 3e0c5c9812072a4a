"""Where the Hugging Face hub's cache keeps what was downloaded. Read without its library, which takes 100 ms to import.

Layout (huggingface_hub's guide "Understand caching"): `models--org--name/refs/<revision>` holds a commit,
`models--org--name/snapshots/<commit>/` links to files in `models--org--name/blobs/`, which are named by content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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
    return held if held.is_dir() else None


def snapshot_folder(cache: Path, repo: str, revision: str) -> Path:
    """Where a repository at a revision lies, or would: while nothing says which commit a name means, under the name."""
    folder = _folder(cache, repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            read = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            read = ""
        commit = read if _COMMIT.fullmatch(read) else f"({revision})"
    return folder / "snapshots" / commit


def snapshots(cache: Path) -> Iterator[tuple[str, Path]]:
    """Every repository of models in the cache with its folder: that of `main`, else the one that came last."""
    for folder in sorted(cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        held = snapshot(cache, repo, "main")
        if held is None:
            there = [path for path in folder.glob("snapshots/*") if _COMMIT.fullmatch(path.name)]
            held = max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
        if held is not None:
            yield repo, held


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_partial(cache: Path, repo: str) -> bool:
    """Whether a download of the repository was begun and not finished."""
    return any((_folder(cache, repo) / "blobs").glob("*.incomplete"))


def _folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"
