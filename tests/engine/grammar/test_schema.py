"""What llguidance would pass over silently is refused; everything else is left to it."""

from __future__ import annotations

from typing import Any

import pytest

from runner.engine.grammar.schema import passed_over

REFUSED: list[tuple[Any, str]] = [
    (
        {"type": "object", "properties": {"a": {"tpye": "string"}}},
        "properties.a.tpye: unknown keyword; did you mean `type`",
    ),
    ({"requried": ["a"]}, "requried: unknown keyword; did you mean `required`"),
    ({"items": {"anyOf": [{}, {"minimun": 3}]}}, "items.anyOf[1].minimun: unknown keyword; did you mean `minimum`"),
    ({"type": "string", "nullable": True}, 'nullable: not a keyword of JSON Schema 2020-12; write "null"'),
    ({"$defs": {"d": {"divisibleBy": 2}}}, "$defs.d.divisibleBy: not a keyword"),
    ({"extends": {"type": "object"}}, "extends: not a keyword of JSON Schema 2020-12; write `allOf`"),
    ({"prefixItems": [{"disallow": "null"}]}, "prefixItems[0].disallow"),
    ({"items": [{"dvision": 1}, {"maximun": 1}]}, "items[1].maximun"),
    ({"additionalProperties": {"enmu": [1]}}, "additionalProperties.enmu: unknown keyword; did you mean `enum`"),
]
KEPT: list[Any] = [
    True,
    {},
    {"title": "T", "description": "d", "default": 1, "examples": [1], "$schema": "s", "$id": "i", "deprecated": True},
    {"properties": {"tpye": {}, "requried": {"type": "string"}, "nullable": {}}, "required": ["tpye"]},
    {"x-order": 1, "x-guidance": {"lenient": False}, "units": "mm", "ui:widget": "textarea"},
    {"nullable": False},
    {"items": [{}], "additionalItems": False},
    {"items": {}, "additionalItems": False},
    {"uniqueItems": True, "not": {}},  # llguidance's to refuse
    {"enum": [{"tpye": 1}], "const": {"minimun": 1}, "default": {"enmu": 1}},
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_refused(schema: Any, reason: str) -> None:
    found = passed_over(schema)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("schema", KEPT)
def test_kept(schema: Any) -> None:
    assert passed_over(schema) is None


def test_items_after_a_list_that_is_none() -> None:
    reason = passed_over({"additionalItems": False})
    assert reason is not None
    assert "`prefixItems`" in reason


def test_nesting_does_not_end_in_a_recursion_error() -> None:
    schema: dict[str, Any] = {"tpye": 1}
    for _ in range(900):
        schema = {"items": schema}
    assert "did you mean `type`" in (passed_over(schema) or "")
