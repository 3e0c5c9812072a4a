"""The manifest's own scalar types: names, sizes and durations, each with words for what is wrong with a bad one."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainValidator, SecretStr, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

from runner.manifest.names import NAME_PATTERN

_UNITS: Final = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SHORT_UNITS: Final = {"k": "KiB", "m": "MiB", "g": "GiB", "t": "TiB"}

# Patterns are text, compiled by `re` at first use: most manifests need one or two of them, and compiling costs start-up
_SIZE: Final = r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)"
_PERCENT: Final = r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%"
_DURATION: Final = r"(?=[0-9])(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?"
_MODEL_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
_ORIGIN: Final = r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@*]+"

GIB: Final = 2**30


def problem(code: str, message: str, hint: str = "") -> PydanticCustomError:
    """An error for a validator to raise. `message` starts with what the value should be."""
    return PydanticCustomError("manifest", "{message}", {"code": code, "message": message, "hint": hint})


def one_as_list(value: Any) -> Any:
    """For lists of texts that may be one text: it, alone in a list."""
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class MemoryAmount:
    """An amount of memory: `size` bytes, or, where `percent` is given, that share of the machine's."""

    size: int = 0
    percent: float | None = None

    def of(self, machine_memory: int) -> int:
        """Bytes, on a machine with `machine_memory` bytes."""
        return self.size if self.percent is None else int(machine_memory * self.percent / 100)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(_memory_amount)

    def __str__(self) -> str:
        return format_size(self.size) if self.percent is None else f"{self.percent:g}%"


def format_size(size: int) -> str:
    """A size for people: the largest unit that gives at least 1, with at most one decimal (`4.2 GiB`)."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{round(size / _UNITS[unit], 1):g} {unit}"
    return f"{size} B"


def parse_size(value: Any) -> int:
    """Bytes from `4GiB`, `512 MB`, or a plain number of bytes."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise problem("E204", "should be a size, and cannot be negative", "such as 4GiB")
        return value
    match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
    if match is None:
        share = isinstance(value, str) and value.endswith("%")
        hint = "a share of the machine is possible in memory only" if share else "such as 4GiB, 512MiB or 1048576"
        raise problem("E208", "should be a size", hint)
    number, unit = match.groups()
    if unit and unit not in _UNITS:
        near = next((u for u in _UNITS if u.lower() == unit.lower()), _SHORT_UNITS.get(unit.lower()))
        raise problem(
            "E208",
            f'should be a size, and "{unit}" is not a unit of one',
            f"did you mean {number}{near}?" if near else f"units are {', '.join(_UNITS)}",
        )
    return int(float(number) * _UNITS[unit or "B"]) if "." in number else int(number) * _UNITS[unit or "B"]


def _memory_amount(value: Any) -> MemoryAmount:
    if isinstance(value, MemoryAmount):
        return value
    if isinstance(value, str) and value.endswith("%"):
        match = re.fullmatch(_PERCENT, value)
        if match is None or not 0 <= float(match[1]) <= 100:
            raise problem("E208", "should be between 0% and 100%")
        return MemoryAmount(percent=float(match[1]))
    return MemoryAmount(size=parse_size(value))


def _duration(value: Any) -> float:
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    if match is None:
        number = f"did you mean {value}s?" if isinstance(value, int) and not isinstance(value, bool) else ""
        raise problem("E208", "should be a duration", number or "such as 30s, 5m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def _name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(NAME_PATTERN, value):
        near = re.sub(r"[^a-z0-9._-]+", "-", value.lower()).strip("-._")[:63]
        raise problem(
            "E207",
            f'"{value}" is not a name: use a-z, 0-9, ".", "_" and "-", with a letter or digit first, at most 63',
            f'did you mean "{near}"?' if near else "such as chat or llama-3.2",
        )
    return value


def _alias(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(_MODEL_ID, value):
        raise problem(
            "E207",
            f'"{value}" is not a model id: use letters, digits, ".", "_", "-" and "/", with a letter or digit first',
            'what follows a ":" in a request names an adapter' if ":" in value else "such as gpt-4o-mini",
        )
    return value


def _host(value: Any) -> Any:
    if not isinstance(value, str) or value == "localhost":
        return value
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, value)
        except (OSError, ValueError):
            continue
        return value
    raise problem("E209", "should be an IP address of this machine", "such as 127.0.0.1, 0.0.0.0 or ::1")


def _origin(value: Any) -> Any:
    if isinstance(value, str) and value != "*" and not re.fullmatch(_ORIGIN, value):
        message = "should be an origin: scheme://host or scheme://host:port, or *"
        raise problem("E209", message, "such as http://localhost:3000")
    return value


def _api_key(value: Any) -> Any:
    if isinstance(value, str):
        if not value:
            raise problem("E505", "is an empty API key", "an empty key would let everybody in; give it a value")
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise problem("E505", "should be an API key: printable ASCII without spaces")
    return value


_SIZE_PATTERN: Final = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?$"
_PERCENT_PATTERN: Final = r"^(100(\.0{1,6})?|[0-9]{1,2}(\.[0-9]{1,6})?) ?%$"

_OCTET: Final = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HOST_PATTERN: Final = rf"^(localhost|{_OCTET}(\.{_OCTET}){{3}}|[0-9A-Fa-f]{{0,4}}:[0-9A-Fa-f]{{0,4}}:[0-9A-Fa-f:.]*)$"

Name = Annotated[str, BeforeValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{NAME_PATTERN}$"})]
"""What the user calls a model, a server or an adapter. No `:` (it joins model and adapter), no `/` (it is a hub id)."""

Alias = Annotated[str, BeforeValidator(_alias), WithJsonSchema({"type": "string", "pattern": f"^{_MODEL_ID}$"})]
"""Another id that requests may use for a model; capitals and `/` are allowed."""

Size = Annotated[
    int,
    PlainValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE_PATTERN}]}),
]
"""Bytes."""

MemorySize = Annotated[
    MemoryAmount,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": _SIZE_PATTERN},
                {"type": "string", "pattern": _PERCENT_PATTERN},
            ]
        }
    ),
]
"""Bytes, or a share of the machine's memory."""

Duration = Annotated[
    float,
    PlainValidator(_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(?=[0-9])([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"}),
]
"""Seconds."""

Host = Annotated[str, BeforeValidator(_host), WithJsonSchema({"type": "string", "pattern": _HOST_PATTERN})]
"""An IP address, or `localhost`."""

Origin = Annotated[
    str,
    BeforeValidator(_origin),
    WithJsonSchema({"type": "string", "pattern": r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@*]+)$"}),
]
"""What a browser sends as `Origin`, or `*`."""

ApiKey = Annotated[SecretStr, BeforeValidator(_api_key), WithJsonSchema({"type": "string", "minLength": 1})]
"""A secret: its repr and its dumps show asterisks."""
