"""Manifests from text, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.load import Loaded, load_manifest

Load = Callable[..., Loaded]
Refused = Callable[..., list[Diagnostic]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a manifest from its text."""

    def load(text: str, env: Mapping[str, str] | None = None) -> Loaded:
        path = tmp_path / "dev.yaml"
        path.write_text(dedent(text), encoding="utf-8")
        return load_manifest(path, env or {})

    return load


@pytest.fixture
def refused(load: Load) -> Refused:
    """The diagnostics of a manifest that cannot be loaded."""

    def refused(text: str, env: Mapping[str, str] | None = None) -> list[Diagnostic]:
        with pytest.raises(ManifestError) as caught:
            load(text, env)
        return caught.value.diagnostics

    return refused
