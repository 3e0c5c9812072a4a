"""What pydantic found wrong, in plain words: what a value should be, what it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pydantic_core import ErrorDetails

from runner.manifest.foreign import ENV_FILE, foreign, other_tool
from runner.manifest.scalars import read_scalar
from runner.manifest.shape import bare, is_section, path_in_tree, type_at
from runner.manifest.suggest import suggest
from runner.manifest.tree import KeyPath, Problem, Tree, is_secret

_SHOWN: Final = 48
_HIDDEN: Final = "a secret"


def problems_of(tree: Tree, details: list[ErrorDetails]) -> list[Problem]:
    """One problem an error, but none for a missing key where a misspelling of it stands in the same place."""
    if isinstance(tree.data, dict) and (message := other_tool(tree.data)):
        return [Problem("E203", (), f"{message}, not a manifest", "it needs name, servers and models")]
    problems = [_problem(tree, detail) for detail in details]
    meant = {(p.path[:-1], p.hint) for p in problems if p.code == "E201"}
    return [
        problem
        for problem, detail in zip(problems, details, strict=True)
        if detail["type"] != "missing" or (problem.path, f'did you mean "{detail["loc"][-1]}"?') not in meant
    ]


def _problem(tree: Tree, detail: ErrorDetails) -> Problem:
    kind, path, value = detail["type"], path_in_tree(tree, detail["loc"]), detail["input"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        hint = _unknown_key_hint(type_at(path[:-1]), str(path[-1]))
        return Problem("E201", path, f'unknown key "{path[-1]}"', hint, at_key=True)
    if kind == "missing":
        field = str(detail["loc"][-1])
        empty = path[-1:] == (field,)  # the key is there, and was taken out for having no value
        section = type_at(path[:-1] if empty else path)
        message = f'"{field}" {"has no value" if empty else "is missing"}'
        return Problem("E202", path, message, _example(section, field), at_key=True)
    if kind == "manifest":
        return Problem(context["code"], path, context["message"], context["hint"], detail["loc"][-1:] == ("[key]",))
    if value is None and path:
        return Problem("E205", path, "has no value", _remedy(path), at_key=True)
    if kind in ("too_short", "string_too_short"):
        return Problem("E205", path, "is empty", _remedy(path))
    if kind == "model_type":
        source = tree.place(()).source
        if not path and (it := foreign(source.text, 1)):
            if it.message == ENV_FILE:
                source.hide_all()
            return Problem("E203", path, it.message, it.hint)
        message, hint = _no_section(type_at(path), value, _shown(tree, path, value), at_root=not path)
        return Problem("E203", path, message, hint)
    return Problem(_code(kind), path, *_words(kind, context, value, _shown(tree, path, value)))


def _code(kind: str) -> str:
    """The code of an error of pydantic's own."""
    if kind == "literal_error":
        return "E206"
    return "E204" if kind in _LIMITS or kind in ("too_long", "string_too_long") else "E203"


def _words(kind: str, context: dict[str, Any], value: Any, shown: str) -> tuple[str, str]:
    """Message and hint for an error of pydantic's own."""
    if kind == "literal_error":
        known = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        return f"should be one of {', '.join(known)}, not {shown}", suggest(str(value), known)
    if kind in _TYPES:
        expected, advise = _TYPES[kind]
        if shown == _HIDDEN:
            return f"should be {expected}", _ADVICE_UNSEEN.get(kind, "")
        return f"should be {expected}, not {shown}", advise(value)
    if kind in _LIMITS:
        phrase, key = _LIMITS[kind]
        bound = context[key]
        return f"should be {phrase} {int(bound) if bound == int(bound) else bound}, not {shown}", ""
    if kind in ("too_long", "string_too_long"):
        things = "entries" if kind == "too_long" else "characters"
        return f"should have at most {context['max_length']} {things}", ""
    return f"is not possible here ({kind.replace('_', ' ')})", ""


def _no_section(section: Any, value: Any, shown: str, *, at_root: bool) -> tuple[str, str]:
    """Message and hint for something else where a mapping with fixed keys should be."""
    message = "should be a mapping (key: value)" + (f", not {shown}" if shown != _HIDDEN else "")
    if at_root:
        return f"the manifest {message}", "it needs name, servers and models"
    if isinstance(value, str) and shown != _HIDDEN:
        key, _, rest = value.partition(":")
        if key in section.model_fields and rest:
            return message, f"put a space after the colon: {key}: {rest}"
        if "source" in section.model_fields:
            return message, f"write source: {value}"
    return message, ""


def _remedy(path: KeyPath) -> str:
    """What to do about a key that has nothing, or too little."""
    above, here = type_at(path[:-1]), type_at(path)
    if is_section(above) and above.model_fields[path[-1]].is_required():
        return _example(above, str(path[-1]))
    needed = [name for name, field in here.model_fields.items() if field.is_required()] if is_section(here) else []
    return f"it needs {', '.join(needed)}" if needed else "give it a value, or remove it"


def _no_hint(_: Any) -> str:
    return ""


def _quote(value: Any) -> str:
    return f'put it in quotes: "{_flow(value)}"' if isinstance(value, bool | int | float) else ""


def _unquote(value: Any) -> str:
    number = isinstance(value, str) and isinstance(read_scalar(value.strip() or "-"), int | float)
    return f"remove the quotes: {value.strip()}" if number else ""


def _boolean(value: Any) -> str:
    meant = {"on": "true", "yes": "true", "y": "true", "off": "false", "no": "false", "n": "false"}
    return f"write {meant[value.lower()]}" if isinstance(value, str) and value.lower() in meant else ""


def _listed(value: Any) -> str:
    return f"write [{value}]" if isinstance(value, str) else ""


_TYPES: Final[dict[str, tuple[str, Callable[[Any], str]]]] = {
    "string_type": ("text", _quote),
    "int_type": ("a whole number", _unquote),
    "int_from_float": ("a whole number", _no_hint),
    "float_type": ("a number", _unquote),
    "finite_number": ("a finite number", _no_hint),
    "bool_type": ("true or false", _boolean),
    "list_type": ("a list", _listed),
    "dict_type": ("a mapping (key: value)", _no_hint),
}
_ADVICE_UNSEEN: Final = {"string_type": "put quotes around it", "list_type": "put brackets around it: [ ]"}
_LIMITS: Final = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}


def _shown(tree: Tree, path: KeyPath, value: Any) -> str:
    """A value as messages show it. What a variable held is not shown: it may be a secret in the wrong place."""
    if path in tree.variables:
        return f"the value of {tree.variables[path].text}"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if is_secret(path):
        return _HIDDEN
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= _SHOWN else f'"{value[:_SHOWN]}…"'
    return _flow(value)


def _unknown_key_hint(section: Any, key: str) -> str:
    fields = section.model_fields if is_section(section) else {}
    if hint := suggest(key, fields):
        return hint
    for name, field in fields.items():
        inner = bare(field.annotation)
        if is_section(inner) and key in inner.model_fields:
            return f'"{key}" belongs under "{name}"'
    return f"known keys: {', '.join(fields)}" if fields else ""


def _example(section: Any, field: str) -> str:
    examples = section.model_fields[field].examples if is_section(section) else None
    return f"for example {field}: {_flow(examples[0])}" if examples else ""


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
