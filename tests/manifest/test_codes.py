"""Codes are registered, explained, and given by the very examples that explain them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import runner
from runner.errors import ManifestError
from runner.manifest.advice import advise
from runner.manifest.codes import GROUPS, registry
from runner.manifest.inputs import MAX_BYTES
from runner.manifest.load import load_manifest

CODES = registry()
NO_EXAMPLE = {"E101", "E102", "E103", "E308", "E509", "E510", "E511", "W101", "W502", "W503", "W602"}
"""About files as such, overlays, or the runner, which no text of a manifest can show; they have tests of their own."""

ON_THE_WAY = {code for code in CODES if code[1] == "8"}
"""Found by downloads, or by comparing with a lock file: tests/hub and tests/plan/test_lock.py have them."""

RESOLVED = {code for code in CODES if code[1] in "67"} - {"E605", "W601", "W611", "W612", "W613", "W614"}
"""Found where folders are looked at: their examples are in tests/plan/test_codes.py."""

HERE = sorted(CODES.keys() - NO_EXAMPLE - RESOLVED - ON_THE_WAY)


def _found(folder: Path, text: str) -> list[str]:
    """The codes of what is said about a manifest, warnings among them."""
    (folder / "secrets").mkdir()
    (folder / "secrets" / "api_key").write_text("key-1\n")
    (folder / "pirate").mkdir()
    (folder / "pirate" / "adapter_config.json").write_text("{}")
    path = folder / "dev.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        return [d.code for d in advise(load_manifest(path, {}))]
    except ManifestError as error:
        return [d.code for d in error.diagnostics]


@pytest.mark.parametrize("code", HERE)
def test_the_wrong_example_gives_the_code_and_no_other(code: str, tmp_path: Path) -> None:
    assert set(_found(tmp_path, CODES[code].completed(CODES[code].wrong))) == {code}


@pytest.mark.parametrize("code", HERE)
def test_the_right_example_is_sound(code: str, tmp_path: Path) -> None:
    assert _found(tmp_path, CODES[code].completed(CODES[code].right)) == []


@pytest.mark.parametrize("code", CODES)
def test_is_explained(code: str) -> None:
    entry = CODES[code]
    assert re.fullmatch(r"[EW][1-8]\d\d", code)
    assert entry.code == code
    assert entry.group in GROUPS.values()
    assert entry.severity == ("error" if code[0] == "E" else "warning")
    assert len(entry.title) <= 60
    assert not entry.title.endswith(".")
    assert 2 <= len(re.findall(r"[.](?= |$)", entry.explanation)) <= 6
    assert "\n" not in entry.explanation
    assert bool(entry.wrong) == bool(entry.right) == (code not in NO_EXAMPLE | ON_THE_WAY)
    assert entry.wrong != entry.right or code in NO_EXAMPLE | ON_THE_WAY


def test_codes_are_in_order_and_their_titles_differ() -> None:
    assert list(CODES) == sorted(CODES)
    assert len({entry.title for entry in CODES.values()}) == len(CODES)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ManifestError) as caught:
            load_manifest(path, {})
        assert [d.code for d in caught.value.diagnostics] == ["E101"]


@pytest.mark.parametrize(
    ("content", "code"), [(b"#" * (MAX_BYTES + 1), "E102"), (b"name: \xff", "E103"), (b"name: \x07", "E103")]
)
def test_a_file_that_is_no_manifest(content: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, {})
    assert [d.code for d in caught.value.diagnostics] == [code]


def test_the_golden_table_has_every_code_that_a_text_can_have() -> None:
    golden = Path(__file__).with_name("mistakes.golden").read_text(encoding="utf-8")
    heads = [line for line in golden.splitlines() if re.match(r"dev\.yaml(:\d+:\d+)?: ", line)]
    codes = [re.search(r" \[(E\d\d\d)\]$", head) for head in heads]
    assert all(codes)
    errors = {code for code in HERE if code.startswith("E")}
    assert {code[1] for code in codes if code} == errors


def _sources() -> Iterator[ast.AST]:
    root = Path(runner.__file__).parent
    rooms = ("manifest", "hub", "plan", "control")
    for path in (path for room in rooms for path in (root / room).glob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_every_code_that_is_raised_is_registered_and_the_other_way_round() -> None:
    texts = {node.value for node in _sources() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {text for text in texts if re.fullmatch(r"[EW]\d{3}", text)} == CODES.keys()


def test_no_diagnostic_is_made_without_a_code() -> None:
    calls = [node for node in _sources() if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in ("Diagnostic", "loaded.at", "self._loaded.at")]
    assert len(made) >= 8
    position = 7  # of `code` among the fields of Diagnostic
    bare = [c for c in made if len(c.args) <= position and not {"code", None} & {k.arg for k in c.keywords}]
    assert [ast.unparse(call) for call in bare] == []
