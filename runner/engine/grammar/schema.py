"""What llguidance would pass over in a JSON Schema without a word, found before it is asked.

It refuses the keywords that it knows and cannot keep. A keyword that it does not know is an annotation to it, as the
specification has it; but some of those are assertions of older drafts, and some are typing errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final

_OF_ONE: Final = ("additionalItems", "additionalProperties", "items")
_OF_SEVERAL: Final = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_OF_NAMED: Final = ("$defs", "definitions", "patternProperties", "properties")
_KEPT: Final = frozenset(
    {
        *_OF_ONE,
        *_OF_SEVERAL,
        *_OF_NAMED,
        "$ref",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "type",
    }
)
_REFUSED_BY_LLGUIDANCE: Final = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
_ANNOTATIONS: Final = frozenset(
    {
        "$anchor",
        "$comment",
        "$id",
        "$schema",
        "$vocabulary",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "externalDocs",
        "id",
        "readOnly",
        "title",
        "writeOnly",
        "xml",
    }
)
_ASSERTIONS_PASSED_OVER: Final = {
    "disallow": "say what is allowed",
    "divisibleBy": "write `multipleOf`",
    "extends": "write `allOf`",
    "nullable": 'write "null" beside the other types in `type`',
}
_CLOSE: Final = 0.75


def passed_over(schema: Any) -> str | None:
    """Why `schema`, parsed from JSON, would not be kept as it reads; None when nothing is passed over."""
    for place, part in _parts(schema, ""):
        for keyword in part:
            if (reason := _reason(keyword, part)) is not None:
                return f"{place}{keyword}: {reason}"
    return None


def _reason(keyword: str, part: Mapping[str, Any]) -> str | None:
    if keyword in _KEPT or keyword in _REFUSED_BY_LLGUIDANCE or keyword in _ANNOTATIONS or keyword.startswith("x-"):
        if keyword == "additionalItems" and "items" in part and not isinstance(part["items"], list):
            return None  # by the specification it means nothing then
        if keyword == "additionalItems" and not isinstance(part.get("items"), list):
            return "it needs `items` to be a list; newer drafts write `prefixItems` and `items`"
        return None
    if (instead := _ASSERTIONS_PASSED_OVER.get(keyword)) is not None:
        return None if part[keyword] is False else f"not a keyword of JSON Schema 2020-12; {instead}"
    close = get_close_matches(keyword, _KEPT | _REFUSED_BY_LLGUIDANCE, n=1, cutoff=_CLOSE)
    return f"unknown keyword; did you mean `{close[0]}`?" if close else None


def _parts(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within `schema`, itself first, each with its place as a prefix for a keyword's name."""
    found: list[tuple[str, Any]] = [(place, schema)]
    while found:
        place, part = found.pop()
        if not isinstance(part, dict):
            continue
        yield place, part
        found += [(f"{place}{keyword}.", part.get(keyword)) for keyword in _OF_ONE]
        for keyword in _OF_SEVERAL:
            if isinstance(several := part.get(keyword), list):
                found += [(f"{place}{keyword}[{index}].", one) for index, one in enumerate(several)]
        for keyword in _OF_NAMED:
            if isinstance(named := part.get(keyword), dict):
                found += [(f"{place}{keyword}.{name}.", one) for name, one in named.items()]
