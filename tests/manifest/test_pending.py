"""What this version cannot do yet is refused at its place, whatever its value."""

from __future__ import annotations

import pytest

from runner.manifest.pending import NOT_YET

from .conftest import Load, Refused

VALUES = {
    "models.*.load": "on_demand",
    "models.*.idle_timeout": "30m",
    "defaults.load": "on_demand",
    "defaults.idle_timeout": "30m",
}


def _nested(pattern: str, value: str) -> str:
    *above, key = pattern.removeprefix("models.*.").removeprefix("defaults.").split(".")
    text = f"{key}: {value}"
    return f"{above[0]}: {{{text}}}" if above else text


def _manifest(pattern: str, value: str) -> str:
    inside = _nested(pattern, value)
    model = f", {inside}" if pattern.startswith("models") else ""
    defaults = f"defaults: {{{inside}}}\n" if pattern.startswith("defaults") else ""
    return f"name: dev\nservers: {{lm: {{port: 8080}}}}\n{defaults}models: {{chat: {{source: ./chat{model}}}}}\n"


@pytest.mark.parametrize("pattern", VALUES)
def test_refused(pattern: str, refused: Refused) -> None:
    (found,) = refused(_manifest(pattern, VALUES[pattern]))
    assert found.path == pattern.replace("*", "chat")
    assert found.message.endswith("is not supported yet by this version")
    assert found.line > 0


@pytest.mark.parametrize("api", ["admin"])
def test_apis(api: str, refused: Refused) -> None:
    text = f"name: dev\nservers: {{lm: {{port: 8080, apis: [openai, {api}]}}}}\nmodels: {{chat: {{source: ./chat}}}}\n"
    (found,) = refused(text)
    assert (found.path, found.message) == ("servers.lm.apis[1]", f'"{api}" is not supported yet by this version')


def test_every_line_of_the_table_is_tried() -> None:
    assert {pattern for pattern, _ in NOT_YET} == {*VALUES, "servers.*.apis.*"}


@pytest.mark.parametrize("pattern", ["models.*.load", "defaults.load"])
def test_what_works_is_taken(pattern: str, load: Load) -> None:
    assert load(_manifest(pattern, "eager")).manifest.name == "dev"


@pytest.mark.parametrize("pattern", VALUES)
def test_a_key_without_a_value_is_not_refused(pattern: str, load: Load) -> None:
    assert load(_manifest(pattern, "")).manifest.name == "dev"


def test_a_variable_does_not_slip_through(refused: Refused) -> None:
    (found,) = refused(_manifest("models.*.load", '"${L}"'), {"L": "on_demand"})
    assert found.path == "models.chat.load"
