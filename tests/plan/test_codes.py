"""The examples of codes that are about folders and memory: found where sources are looked at."""

from __future__ import annotations

import os

import pytest

from runner.errors import ManifestError
from runner.manifest.codes import registry

from .conftest import Place
from .folders import GIB, adapter, model, sparse

CODES = registry()
RESOLVED = ["E601", "E602", "E603", "E604", "E701", "E702"]


@pytest.fixture
def folders(place: Place) -> Place:
    """The folders that `codes.toml` speaks of."""
    model(place.folder / "chat")
    adapter(place.folder / "pirate")
    sparse(place.folder / "large", 5 * GIB)
    model(place.folder / "damaged")
    os.truncate(place.folder / "damaged" / "model.safetensors", 500)
    return place


@pytest.mark.parametrize("code", RESOLVED)
def test_the_wrong_example_gives_the_code_and_no_other(code: str, folders: Place) -> None:
    with pytest.raises(ManifestError) as caught:
        folders.resolve(CODES[code].completed(CODES[code].wrong))
    assert {d.code for d in caught.value.diagnostics} == {code}


@pytest.mark.parametrize("code", RESOLVED)
def test_the_right_example_is_sound(code: str, folders: Place) -> None:
    assert folders.resolve(CODES[code].completed(CODES[code].right)).models
