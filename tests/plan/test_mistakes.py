"""What people get wrong about the files behind a manifest, and what they are told: mistakes.golden, reviewed as text.

Each case is a title, a manifest and what is said about it, for a machine with a GPU and 16 GiB, and the folders of
`conftest.folders`. After a change of wording:

    UPDATE_GOLDEN=1 pytest tests/plan/test_mistakes.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from runner.machine import Machine
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics
from runner.plan.resolve import look

from .conftest import Place
from .folders import GIB, write

GOLDEN = Path(__file__).with_name("mistakes.golden")


def _cases() -> dict[str, tuple[str, str]]:
    """Title → (manifest, what is said)."""
    parts = re.split(r"^=== (.*)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    titles, texts = parts[0::4], parts[1::4]
    assert parts[2::4] == ["says"] * len(titles)
    return {title: (text, said) for title, text, said in zip(titles, texts, parts[3::4], strict=True)}


CASES = _cases()


def _said(place: Place, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(place.folder)
    write(place.folder / "dev.yaml", text)
    found = look(load_manifest(Path("dev.yaml"), {}), Machine(16 * GIB), place.cache)
    said = render_diagnostics(sorted([*found.wrong, *found.desired.warnings], key=lambda d: (d.line, d.column)))
    return said.replace(str(place.folder), "FOLDER") + "\n"


@pytest.mark.parametrize("title", CASES)
def test_says(title: str, folders: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = CASES[title]
    said = _said(folders, text, monkeypatch)
    if os.environ.get("UPDATE_GOLDEN"):
        cases = {**_cases(), title: (text, said)}
        whole = "".join(f"=== {t}\n{manifest}=== says\n{says}" for t, (manifest, says) in cases.items())
        GOLDEN.write_text(whole, encoding="utf-8")
    else:
        assert said == expected


def test_every_mistake_is_told_with_its_place_and_a_hint() -> None:
    assert len(CASES) >= 25
    for title, (_, said) in CASES.items():
        heads = [line for line in said.splitlines() if line.startswith("dev.yaml")]
        assert heads, title
        assert all(re.match(r"dev\.yaml:\d+:\d+: .* \[[EW]\d{3}\]$", head) for head in heads), title
        assert said.count("^ ") >= len(heads), title
