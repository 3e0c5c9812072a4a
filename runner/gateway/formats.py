"""Forms of an answer as every API has them → `Grammar`: any JSON object, or one that a schema describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from runner.errors import InvalidRequest
from runner.protocol import Grammar

_LABELS: Final = ("name", "description", "strict")
"""Beside a schema; the schema holds whether `strict` or not."""


def any_object(param: str) -> Grammar:
    """For the field `param`."""
    return Grammar("json", '{"type":"object"}', param)


def schema_grammar(schema: Any, param: str) -> Grammar:
    """A JSON Schema that has been decoded. Raises InvalidRequest."""
    if not isinstance(schema, dict):
        reason = "is missing" if schema is None else "should be an object"
        raise InvalidRequest(f"`{param}` {reason}", param=param, code="invalid_value")
    return Grammar("json", msgspec.json.encode(schema).decode(), param)


def format_grammar(form: Mapping[str, Any] | None, param: str) -> Grammar | None:
    """`{type: text}`, `{type: json_object}` or `{type: json_schema, schema: …}`. Raises InvalidRequest."""
    if form is None:
        return None
    known: dict[object, tuple[str, ...]] = {"text": (), "json_object": (), "json_schema": ("schema", *_LABELS)}
    kind = form.get("type")
    if not isinstance(kind, str) or kind not in known:
        message = f"`{param}.type` should be text, json_object or json_schema"
        raise InvalidRequest(message, param=f"{param}.type", code="invalid_value")
    for name in form:
        if name not in ("type", *known[kind]):
            message = f"unknown field `{name}` in `{param}`"
            raise InvalidRequest(message, param=f"{param}.{name}", code="unknown_field")
    if kind == "json_schema":
        return schema_grammar(form.get("schema"), f"{param}.schema")
    return any_object(param) if kind == "json_object" else None
