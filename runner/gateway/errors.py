"""The one place where errors become HTTP answers, in OpenAI's shape: `{"error": {message, type, param, code}}`.

`RequestError` carries its status; whatever else escapes a handler is a 500 that is logged with its traceback, and tells
the client nothing of it. (What Falcon raises itself, such as 405, is put into this shape in `runner.gateway.app`.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from runner.errors import EngineFailed, MlxRunError, RequestError, Unavailable

logger = logging.getLogger(__name__)

_encoder = msgspec.json.Encoder()
_ANTHROPIC_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON body of an error."""
    return _encoder.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_kind(status: int) -> str:
    """OpenAI's `type` for an HTTP status."""
    return _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def anthropic_kind(status: int) -> str:
    """Anthropic's `type` for an HTTP status."""
    return _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")


def describe(error: Exception) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for any exception; what is not ours is a 500 without details.

    Errors of other branches of the tree (an engine that cannot load) reach a request only through a bug in a
    deployment, and are answered as a failing engine.
    """
    if isinstance(error, RequestError):
        headers = {}
        if isinstance(error, Unavailable):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error.status, headers, error_body(str(error), error.kind, param=error.param, code=error.code)
    if isinstance(error, MlxRunError):
        return EngineFailed.status, {}, error_body(str(error), EngineFailed.kind)
    return 500, {}, error_body("internal error; the runner's log has the details", "server_error")


def as_event(error: Exception) -> bytes:
    """The error as a server-sent event, for an answer that has begun: its status can no longer say it."""
    return b"data: " + describe(error)[2] + b"\n\n"


def report(error: Exception, fields: Mapping[str, Any]) -> None:
    """Logs what is not the client's doing: 5xx other than "not now", with a traceback when it is not one of ours."""
    if not isinstance(error, MlxRunError):
        logger.error("request handler failed", extra=dict(fields), exc_info=error)
    elif not isinstance(error, Unavailable) and describe(error)[0] >= 500:
        logger.error("request failed", extra={**fields, "error": str(error)})
