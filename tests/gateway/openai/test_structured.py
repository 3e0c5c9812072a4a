"""What an answer has to match: both ways to say it reach the engine as one, and what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.protocol import Grammar
from tests.gateway.conftest import Client
from tests.gateway.fakes import FakeDeployment

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"minimum": 1.50}}}


def response_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


HONOURED: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type":"object"}', "response_format")),
    (
        response_format(schema=SCHEMA, name="person", description="someone", strict=True),
        Grammar("json", json.dumps(SCHEMA), "response_format.json_schema.schema"),
    ),
    (
        response_format(schema=SCHEMA, strict=False),
        Grammar("json", json.dumps(SCHEMA), "response_format.json_schema.schema"),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json", json.dumps(SCHEMA), "structured_outputs.json")),
    ({"structured_outputs": {"json": '{"a": "é"}'}}, Grammar("json", '{"a": "é"}', "structured_outputs.json")),
    ({"structured_outputs": {"regex": r"\d+"}}, Grammar("regex", r"\d+", "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a", "é"]}}, Grammar("choice", '["a","é"]', "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": "start: /x/"}}, Grammar("lark", "start: /x/", "structured_outputs.grammar")),
    (
        {"structured_outputs": {"regex": "x", "json": None, "choice": None}, "response_format": {"type": "text"}},
        Grammar("regex", "x", "structured_outputs.regex"),
    ),
]


@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize(("fields", "grammar"), HONOURED)
async def test_reaches_the_engine(
    client: Client, deployment: FakeDeployment, path: str, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    response = await getattr(client, path)(**fields)
    assert response.status_code == 200, response.text
    assert deployment.requests[0].grammar == grammar


async def test_every_choice_has_it(client: Client, deployment: FakeDeployment) -> None:
    await client.chat(n=2, seed=1, structured_outputs={"regex": "x"})
    assert {request.grammar for request in deployment.requests} == {Grammar("regex", "x", "structured_outputs.regex")}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": {}}, "response_format.type", "missing"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (response_format(name="x"), "response_format.json_schema.schema", "missing"),
    (response_format(schema=None), "response_format.json_schema.schema", "missing"),
    (response_format(schema={}, shema=1), "response_format.json_schema.shema", "did you mean `schema`?"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"json": None}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "x", "choice": ["x"]}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "length >= 1"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "got `integer`"),
    ({"structured_outputs": {"regexp": "x"}}, "structured_outputs.regexp", "did you mean `regex`?"),
    (
        {"structured_outputs": {"regex": "x"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "send one",
    ),
]


@pytest.mark.parametrize(("fields", "param", "hint"), WRONG)
async def test_what_is_wrong_is_named(
    client: Client, deployment: FakeDeployment, fields: dict[str, Any], param: str, hint: str
) -> None:
    response = await client.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json["error"]
    assert error["param"] == param
    assert hint in error["message"]
    assert deployment.requests == []
