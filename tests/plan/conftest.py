"""A folder with a manifest in it, and a hub cache beside it."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.load import load_manifest
from runner.plan.digests import DigestCache
from runner.plan.resolve import NotDownloaded, resolve
from runner.plan.spec import Desired

from .folders import GIB, later, write


class Place:
    """A folder with a manifest in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = DigestCache(now=later)
        self.env = {"KEY": "sk-secret"}

    def resolve(self, text: str, *, machine_memory: int = 16 * GIB) -> Desired:
        path = write(self.folder / "dev.yaml", dedent(text))
        return resolve(load_manifest(path, self.env), machine_memory=machine_memory, cache=self.cache)

    def wrong(self, text: str, *, machine_memory: int = 16 * GIB) -> list[Diagnostic]:
        with pytest.raises(ManifestError) as caught:
            self.resolve(text, machine_memory=machine_memory)
        assert not isinstance(caught.value, NotDownloaded)
        return caught.value.diagnostics


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "configs").mkdir()
    return Place(tmp_path / "configs")
