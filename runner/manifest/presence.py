"""What is at a path, where nothing that is wrong with the path is an error: `pathlib` raises for names that are too
long, for folders that may not be entered, and for the home of a user that there is none of. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def is_folder(path: Path) -> bool:
    """Whether a folder can be seen there."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Whether a regular file can be seen there."""
    return os.path.isfile(path)  # noqa: PTH113


def from_home(path: str) -> Path:
    """A path with `~` and `~user` filled in, as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
