"""The examples of codes that are about folders and memory: found where sources are looked at."""

from __future__ import annotations

import pytest

from runner.errors import ManifestError
from runner.manifest.codes import registry

from .conftest import Place

CODES = registry()
ELSEWHERE = ("E605", "W601", "W602", "W611", "W612", "W613", "W614")
RESOLVED = [code for code in CODES if code[1] in "67" and code not in ELSEWHERE]


def _codes(folders: Place, text: str) -> set[str]:
    try:
        return {d.code for d in folders.resolve(text).warnings}
    except ManifestError as error:
        return {d.code for d in error.diagnostics}


@pytest.mark.parametrize("code", RESOLVED)
def test_the_wrong_example_gives_the_code_and_no_other(code: str, folders: Place) -> None:
    assert _codes(folders, CODES[code].completed(CODES[code].wrong)) == {code}


@pytest.mark.parametrize("code", RESOLVED)
def test_the_right_example_is_sound(code: str, folders: Place) -> None:
    assert _codes(folders, CODES[code].completed(CODES[code].right)) == set()
