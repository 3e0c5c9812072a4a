"""`${…}` follows Docker Compose."""

from __future__ import annotations

import pytest

from runner.manifest.interpolate import InterpolationError, interpolate

ENV = {"SET": "value", "EMPTY": "", "DOLLAR": "${SET}", "file": "a variable called file"}


def _no_file(path: str) -> str:
    raise AssertionError(f"read {path}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("${SET}", "value"),
        ("a ${SET} b ${SET}", "a value b value"),
        ("${EMPTY}", ""),
        ("${UNSET:-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("${SET:-default}", "value"),
        ("${UNSET-default}", "default"),
        ("${EMPTY-default}", ""),
        ("${UNSET:-}", ""),
        ("${UNSET-}", ""),
        ("${SET:?needed}", "value"),
        ("${EMPTY?needed}", ""),
        ("${SET:+there}", "there"),
        ("${EMPTY:+there}", ""),
        ("${EMPTY+there}", "there"),
        ("${UNSET+there}", ""),
        ("$$", "$"),
        ("$$SET", "$SET"),
        ("$${SET}", "${SET}"),
        ("a$$$$b", "a$$b"),
        ("${UNSET:-${SET}}", "value"),
        ("${UNSET:-${OTHER:-${SET}}}", "value"),
        ("${UNSET:-a}b}", "ab}"),
        ("${UNSET:-{}}", "{}"),
        ("${UNSET:-$$}", "$"),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${DOLLAR}", "${SET}"),
        ("${SET:-${UNSET}}", "value"),
        ("${UNSET+${OTHER:?never}}", ""),
        ("${file}", "a variable called file"),
        ("${file:-x}", "a variable called file"),
        ("{}", "{}"),
        ("}", "}"),
    ],
)
def test_value(text: str, value: str) -> None:
    assert interpolate(text, ENV, _no_file) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${UNSET}", "the environment variable UNSET is not set"),
        ("${UNSET:?give one}", "the environment variable UNSET is not set: give one"),
        ("${EMPTY:?give one}", "the environment variable EMPTY is empty: give one"),
        ("${EMPTY:?}", "the environment variable EMPTY is empty"),
        ("${UNSET?${SET}}", "the environment variable UNSET is not set: value"),
        ("${UNSET:-${OTHER}}", "the environment variable OTHER is not set"),
        ("$SET", "a $ that begins no variable"),
        ("costs $5", "a $ that begins no variable"),
        ("$", "a $ that begins no variable"),
        ("${", "a $ that begins no variable"),
        ("${}", "a $ that begins no variable"),
        ("${1}", "a $ that begins no variable"),
        ("${SET", "a ${ has no closing }"),
        ("${UNSET:-${SET}", "a ${ has no closing }"),
        ("${SET }", "a ${…} that is none of the known forms"),
        ("${SET:x}", "a ${…} that is none of the known forms"),
        ("${UNSET:-" * 20 + "}" * 20, "${…} is nested more than 8 deep"),
    ],
)
def test_error(text: str, message: str) -> None:
    with pytest.raises(InterpolationError) as caught:
        interpolate(text, ENV, _no_file)
    assert caught.value.message == message


def test_file() -> None:
    read: list[str] = []

    def file(path: str) -> str:
        read.append(path)
        return f"<{path}>"

    assert interpolate("a ${file:secrets/key} b", ENV, file) == "a <secrets/key> b"
    assert interpolate("${file:${SET}/key}", ENV, file) == "<value/key>"
    assert interpolate("${UNSET:-${file:key}}", ENV, file) == "<key>"
    assert interpolate("${SET:-${file:never}}", ENV, file) == "value"
    assert read == ["secrets/key", "value/key", "key"]
