"""1,000 manifests, valid and damaged: what the loader says of each, and that the JSON schema is of one mind with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics
from runner.manifest.schema import SCHEMA_FILE
from runner.manifest.source import Source
from runner.manifest.tree import dotted
from runner.manifest.walk import read_tree

from .generated import DAMAGES, Case, cases

ENV = {"KEY": "sk-of-the-environment", "WORD": "word"}
SEED = 20261123
VALIDATOR = jsonschema.Draft7Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))

SAYABLE = {"E201", "E202", "E203", "E204", "E205", "E206", "E207", "E208", "E209", "E210"}
"""Codes of what one place of the document tells alone. A schema says it, but for what `UNSAYABLE` lists."""

UNSAYABLE = {
    "bad_address_by_value": "whether the parts of an IPv6 address are possible together",
    "reference": "names that are given elsewhere in the document",
    "collision": "names, ports and aliases that are taken elsewhere, and which names have a meaning",
    "unset": "the environment",
    "bad_reference": "the forms of ${…}, which may stand in any text",
    "secret": "files, and what two keys say together",
    "no_env_file": "files",
    "variable_of_the_wrong_kind": "what a variable stands for",
}
"""Classes of damage that a JSON schema has no way to refuse, and why."""


class Result(NamedTuple):
    case: Case
    codes: frozenset[str]
    paths: frozenset[str]
    said: str
    schema: bool | None


def _result(case: Case, folder: Path) -> Result:
    path = folder / "dev.yaml"
    path.write_bytes(case.text.encode("utf-8"))
    try:
        load_manifest(path, ENV)
        codes, paths, said = frozenset[str](), frozenset[str](), ""
    except ManifestError as error:
        codes = frozenset(d.code for d in error.diagnostics)
        paths = frozenset(d.path for d in error.diagnostics)
        said = render_diagnostics(error.diagnostics)
    return Result(case, codes, paths, said, _schema_takes(case.text))


def _schema_takes(text: str) -> bool | None:
    """None where there is no document to look at."""
    try:
        seen: Any = read_tree(Source("dev.yaml", Path("/dev.yaml"), text.removeprefix("\ufeff"))).data
    except ManifestError:
        return None
    return VALIDATOR.is_valid(seen)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = tmp_path_factory.mktemp("generated")
    return [_result(case, folder) for case in cases(1000, SEED)]


def test_valid_ones_are_taken_by_the_loader_and_by_the_schema(results: list[Result]) -> None:
    valid = [result for result in results if not result.case.damage]
    assert len(valid) == 334
    assert [(r.case.text, r.said) for r in valid if r.codes] == []
    assert [r.case.text for r in valid if not r.schema] == []


def test_every_damage_is_told_by_its_code(results: list[Result]) -> None:
    damaged = [result for result in results if result.case.damage]
    assert Counter(r.case.damage for r in damaged).keys() == DAMAGES.keys()
    assert min(Counter(r.case.damage for r in damaged).values()) >= 25
    missed = [(r.case.damage, r.case.text, r.said) for r in damaged if not r.case.codes & r.codes]
    assert missed == []


def test_no_unknown_key_is_accepted_and_each_is_told_at_its_place(results: list[Result]) -> None:
    unknown = [result for result in results if result.case.damage in ("unknown_key", "misspelt_key")]
    assert len(unknown) >= 50
    assert [(r.case.path, r.said) for r in unknown if dotted(r.case.path) not in r.paths] == []


def test_the_schema_refuses_what_the_loader_refuses_as_far_as_it_can_be_said(results: list[Result]) -> None:
    assert UNSAYABLE.keys() <= DAMAGES.keys()
    for result in results:
        case = result.case
        if case.sayable is None:
            continue
        assert (case.sayable is False) == (case.damage in UNSAYABLE) or not case.damage
        if case.damage in UNSAYABLE:
            assert result.schema is True, (case.damage, case.text, result.said)
        elif case.damage:
            assert result.schema is False, (case.damage, case.text, result.said)


def test_the_schema_refuses_nothing_that_the_loader_takes(results: list[Result]) -> None:
    assert [r.case.text for r in results if r.schema is False and not r.codes] == []


def test_the_schema_takes_nothing_that_is_wrong_in_its_shape(results: list[Result]) -> None:
    shape = [r for r in results if r.codes & SAYABLE and r.case.damage not in UNSAYABLE]
    assert len(shape) >= 250
    assert [(r.case.damage, r.said) for r in shape if r.schema is True] == []


def test_no_secret_of_the_environment_is_told(results: list[Result]) -> None:
    assert [r.said for r in results if "sk-of-the" in r.said] == []


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_more(seed: int, tmp_path: Path) -> None:
    for case in cases(1000, seed):
        result = _result(case, tmp_path)
        assert bool(result.codes) == bool(case.damage), (case, result.said)
        assert not case.codes or case.codes & result.codes, (case, result.said)
        if case.sayable is not None:
            assert result.schema is (case.damage in UNSAYABLE), (case, result.said)
