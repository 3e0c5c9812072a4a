"""Where the Hugging Face hub's cache keeps what was downloaded. Read without its library, which takes 100 ms to import.

Layout (huggingface_hub's guide "Understand caching"): `models--org--name/refs/<revision>` holds a commit,
`models--org--name/snapshots/<commit>/` links to files in `models--org--name/blobs/`, which are named by content.
"""

from __future__ import annotations

import re
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
    folder = _folder(cache, repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    held = folder / "snapshots" / commit
    return held if held.is_dir() else None


def is_partial(cache: Path, repo: str) -> bool:
    """Whether a download of the repository was begun and not finished."""
    return any((_folder(cache, repo) / "blobs").glob("*.incomplete"))


def _folder(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"
