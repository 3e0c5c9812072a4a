"""Typical mistakes and, word for word, what is said about them.

`mistakes.golden` holds both. After a change of words, write the file anew and read the difference:

    UPDATE_GOLDEN=1 pytest tests/manifest/test_mistakes.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics

GOLDEN = Path(__file__).with_name("mistakes.golden")
ENV = {"EMPTY": "", "WORD": "abc", "PORT": "8081"}


def _cases() -> dict[str, tuple[str, str]]:
    """Title → (manifest, what is said)."""
    parts = re.split(r"^=== (.*)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    titles, texts = parts[0::4], parts[1::4]
    assert parts[2::4] == ["says"] * len(titles)
    return {title: (text, said) for title, text, said in zip(titles, texts, parts[3::4], strict=True)}


CASES = _cases()


def _said(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    Path("dev.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        load_manifest(Path("dev.yaml"), ENV)
    return render_diagnostics(caught.value.diagnostics).replace(str(folder), "FOLDER") + "\n"


def _write(title: str, said: str) -> None:
    cases = {**_cases(), title: (CASES[title][0], said)}
    GOLDEN.write_text(
        "".join(f"=== {t}\n{text}=== says\n{says}" for t, (text, says) in cases.items()), encoding="utf-8"
    )


@pytest.mark.parametrize("title", CASES)
def test_says(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = CASES[title]
    said = _said(tmp_path, text, monkeypatch)
    assert "secret-" not in said.replace("secret-file", "")
    if os.environ.get("UPDATE_GOLDEN"):
        _write(title, said)
    else:
        assert said == expected


def test_every_mistake_is_told_with_its_place() -> None:
    assert len(CASES) >= 40
    placeless = {title for title, (_, said) in CASES.items() if not re.match(r"dev\.yaml:\d+:\d+: ", said)}
    assert placeless == {"an empty manifest", "a null manifest"}
