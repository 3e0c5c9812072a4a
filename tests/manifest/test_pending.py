"""What this version cannot do yet is refused at its place, whatever its value."""

from __future__ import annotations

import pytest

from runner.manifest.pending import NOT_YET

from .conftest import Load, Refused

WORKS = {
    "quantization": "{bits: 4}",
    "load": "on_demand",
    "idle_timeout": "30m",
    "priority": "5",
    "dtype": "float16",
}


@pytest.mark.parametrize("api", ["admin"])
def test_apis(api: str, refused: Refused) -> None:
    text = f"name: dev\nservers: {{lm: {{port: 8080, apis: [openai, {api}]}}}}\nmodels: {{chat: {{source: ./chat}}}}\n"
    (found,) = refused(text)
    assert (found.path, found.message) == ("servers.lm.apis[1]", f'"{api}" is not supported yet by this version')
    assert found.line == 2


def test_a_variable_does_not_slip_through(refused: Refused) -> None:
    text = 'name: dev\nservers: {lm: {port: 8080, apis: ["${A}"]}}\nmodels: {chat: {source: ./chat}}\n'
    (found,) = refused(text, {"A": "admin"})
    assert found.path == "servers.lm.apis[0]"


def test_every_line_of_the_table_is_tried() -> None:
    assert {pattern for pattern, _ in NOT_YET} == {"servers.*.apis.*"}


@pytest.mark.parametrize("key", WORKS)
def test_what_works_is_taken(key: str, load: Load) -> None:
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat, KEY}}\n"
    assert load(text.replace("KEY", f"{key}: {WORKS[key]}")).manifest.name == "dev"
