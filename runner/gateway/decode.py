"""Request bodies, decoded: whatever is wrong with one is a 400 that names the field."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

import falcon
import msgspec
from falcon.asgi import Request

from runner.errors import InvalidRequest

T = TypeVar("T")

TOO_DEEP: Final = "the body is nested too deeply"

_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_HEAD: Final = re.compile(r"[.\[]")
_KIND: Final = re.compile(r"(?:expected|got) `[^`]*`")
_WORD: Final = re.compile(r"\b(?:str|int|float|bool)\b")
_WORDS: Final = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_NOT_AMONG: Final = ("Invalid enum value", "Invalid value")
_ELSEWHERE: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
"""Fields by which a body is known to be meant for another path."""
_MISSING: Final = re.compile(r"Object missing required field `(.*)`$")


Names = Mapping[str, Collection[str]]
"""Field names to suggest from: those of the body under "", those of what a field holds under that field's name."""


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], names: Names, *, any_type: bool = False) -> T:
    """The body as the decoder's type.

    A body that does not say that it is JSON is refused (415): a page on the web may send any other kind to a local
    server without asking its browser's leave first. With `any_type`, for an API whose own examples leave the type to
    curl, that holds for requests that a page sends (they carry `Origin`), and not for the others.

    Raises InvalidRequest, TooLarge, and falcon.HTTPUnsupportedMediaType.
    """
    kind = (request.content_type or "").partition(";")[0].strip().lower()
    trusted = any_type and request.get_header("origin") is None
    if not trusted and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise falcon.HTTPUnsupportedMediaType(description="send the body with `Content-Type: application/json`")
    body = await request.stream.read()
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), names, decoder.type, request.path) from None
    except msgspec.DecodeError as error:
        message = "the body is empty" if not body.strip() else f"the body is not valid JSON: {error}"
        raise InvalidRequest(message, code="invalid_json") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest(TOO_DEEP, code="invalid_json") from None


def convert(value: Any, kind: Any, place: str, names: Names) -> Any:
    """A decoded value as a type, for parts of a body that cannot be decoded in one pass. `place` is where it stands.

    Raises InvalidRequest.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = _invalid(str(error), names, kind)
        param = f"{place}.{found.param}" if found.param else place
        message = found.message.replace("the body: ", f"`{place}`: ", 1)
        if found.param:
            message = message.replace(f"`{found.param}`", f"`{param}`", 1)
        raise InvalidRequest(message, param=param, code=found.code) from None


def _invalid(text: str, names: Names, kind: Any, url_path: str = "") -> InvalidRequest:
    """msgspec's message about a body of `kind`, turned so that the field comes first, in JSON's words."""
    place = _PLACE.search(text)
    path = place.group(1) if place else ""
    reason = _KIND.sub(_in_words, text[: place.start()] if place else text)
    if unknown := _UNKNOWN.match(reason):
        field = unknown.group(1)
        where = f" in `{path}`" if path else ""
        param = f"{path}.{field}" if path else field
        other = _ELSEWHERE.get(param) if url_path.startswith("/v1/") else None
        near = names.get(_HEAD.split(path, maxsplit=1)[0], ())
        hint = f"; it is one of {other}" if other else _suggestion(field, near)
        return InvalidRequest(f"unknown field `{field}`{where}{hint}", param=param, code="unknown_field")
    if missing := _MISSING.match(reason):
        param = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return InvalidRequest(f"`{param}` is missing", param=param, code="missing_field")
    if not path:
        return InvalidRequest(f"the body: {_lower(reason)}", code="invalid_type")
    if reason.startswith(_NOT_AMONG):
        reason += _choices(kind, path)
    param = path.replace("[...]", "")
    return InvalidRequest(f"`{param}`: {_lower(reason)}", param=param, code="invalid_value")


def _in_words(kinds: re.Match[str]) -> str:
    """`str | null` as `string | null`."""
    return _WORD.sub(lambda word: _WORDS[word[0]], kinds[0])


def _choices(kind: Any, path: str) -> str:
    from runner.gateway.allowed import allowed  # noqa: PLC0415 - as below

    values = allowed(kind, path)
    return f"; it is one of {', '.join(values)}" if values else ""


def _lower(reason: str) -> str:
    return reason[:1].lower() + reason[1:]


def _suggestion(field: str, names: Collection[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only a wrong request needs it, and start-up must not pay

    field = field[:64]
    close = [name for name in names if field in name] or get_close_matches(field, names, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
