"""The manifest's JSON schema, which editors read: `python -m runner.manifest.schema [--write]`.

Draft-07, because yaml-language-server reads that well; pydantic emits 2020-12. What the loader does before the models
see a value is said here too: `${…}` may stand for any scalar, a key may be left without a value, and `x-` keys are the
user's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runner.manifest.models import Manifest
from runner.manifest.pending import NOT_YET
from runner.manifest.shape import type_at

SCHEMA_FILE: Final = Path(__file__).parents[2] / "schemas" / "manifest.schema.json"
OVERLAY_FILE: Final = SCHEMA_FILE.with_name("overlay.schema.json")

_VARIABLE: Final = {
    "type": "string",
    "pattern": r"\$[A-Za-z_{]",
    "description": "Filled in from the environment: ${NAME}, ${NAME:-default} or ${NAME:?message}.",
}
_RESET: Final = {"const": ""}
"""What `!reset` is to an editor that was told that it is a tag of scalars."""

_Schema = dict[str, Any]


def manifest_schema() -> _Schema:
    """The schema as plain data."""
    generated = Manifest.model_json_schema(ref_template="#/definitions/{model}")
    definitions = generated.pop("$defs")
    for section, field, values in _fields_not_yet():
        which = f"Not supported yet by this version: {', '.join(values)}." if values else "Not supported yet."
        definitions[section]["properties"][field]["description"] += f" {which}"
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_section(generated),
        "title": "mlx-run manifest",
        "definitions": {"Variable": _VARIABLE} | {name: _section(definitions[name]) for name in sorted(definitions)},
    }


def _fields_not_yet() -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
    """(section's class, field, values or None for all) of what is refused, each once."""
    found: dict[tuple[str, str], tuple[str, ...] | None] = {}
    for pattern, values in NOT_YET:
        *above, field = pattern.removesuffix(".*").split(".")
        found[type_at(tuple(above)).__name__, field] = values
    for (section, name), values in found.items():
        yield section, name, values


def _section(schema: _Schema) -> _Schema:
    """A mapping with fixed keys."""
    required = schema.get("required", [])
    properties = {
        name: _described(_value(field), field, optional=name not in required)
        for name, field in schema["properties"].items()
    }
    kept = {key: schema[key] for key in ("description", "type", "required", "additionalProperties") if key in schema}
    return kept | {"properties": properties, "patternProperties": {"^x-": {}}}


def _described(value: _Schema, field: _Schema, *, optional: bool) -> _Schema:
    """A field: what its value may be, and what editors say about it. An optional one may be left without a value."""
    choices = _choices(value)
    if optional and {"type": "null"} not in choices:
        choices.append({"type": "null"})
    about: _Schema = {key: field[key] for key in ("description", "examples") if key in field}
    if field.get("default") is not None:
        about["default"] = field["default"]
    return about | (choices[0] if len(choices) == 1 and "$ref" not in choices[0] else {"anyOf": choices})


def _choices(value: _Schema) -> list[_Schema]:
    return list(value["anyOf"]) if value.keys() == {"anyOf"} else [value]


def _value(schema: _Schema) -> _Schema:
    """What may stand at a place, without titles and descriptions; scalars that are not free text may be `${…}`."""
    if "anyOf" in schema:
        choices = [choice for option in schema["anyOf"] for choice in _choices(_value(option))]
        return {"anyOf": [choice for at, choice in enumerate(choices) if choice not in choices[:at]]}
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    kept = {key: schema[key] for key in schema.keys() - {"title", "description", "examples", "default"}}
    kept = {key: kept[key] for key in sorted(kept)}
    if kept.get("type") == "array":
        return kept | {"items": _value(kept["items"])}
    if kept.get("type") == "object" and "patternProperties" in kept:
        ((pattern, entry),) = kept.pop("patternProperties").items()  # pydantic's form lets keys pass that do not match
        return kept | {"propertyNames": {"pattern": pattern}, "additionalProperties": _value(entry)}
    if kept.get("type") in ("null", "object") or (
        kept.get("type") == "string" and not kept.keys() & {"pattern", "enum"}
    ):
        return kept
    return {"anyOf": [kept, {"$ref": "#/definitions/Variable"}]}


def overlay_schema() -> _Schema:
    """As `manifest_schema`, for a file that goes over others: nothing has to be there, and any key can be `!reset`."""
    return {**_loosened(manifest_schema()), "title": "mlx-run overlay"}


def _loosened(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_loosened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    loose = {key: _loosened(value) for key, value in schema.items()}
    if loose.get("type") == "object":
        loose.pop("required", None)
        loose.pop("minProperties", None)
        if isinstance(entry := loose.get("additionalProperties"), dict):
            loose["additionalProperties"] = _or_nothing(entry)
        if "patternProperties" in loose:  # a section, not names of the user's
            loose["properties"] = {key: _or_nothing(value) for key, value in loose["properties"].items()}
    return loose


def _or_nothing(value: _Schema) -> _Schema:
    about = {key: value[key] for key in ("description", "examples", "default") if key in value}
    choices = _choices({key: value[key] for key in value if key not in about})
    return about | {"anyOf": [*choices, *([] if {"type": "null"} in choices else [{"type": "null"}]), _RESET]}


def render_schema(*, overlay: bool = False) -> str:
    """The schema as the text of the committed file."""
    return json.dumps(overlay_schema() if overlay else manifest_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Print the manifest's JSON schema, or write it to where the repository keeps it."""
    parser = argparse.ArgumentParser(prog="python -m runner.manifest.schema", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write schemas/, in a checkout")
    if parser.parse_args().write:
        if not SCHEMA_FILE.parent.is_dir():
            parser.error(f"there is no folder {SCHEMA_FILE.parent}: --write is for a checkout of the repository")
        SCHEMA_FILE.write_text(render_schema(), encoding="utf-8")
        OVERLAY_FILE.write_text(render_schema(overlay=True), encoding="utf-8")
    else:
        sys.stdout.write(render_schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())
