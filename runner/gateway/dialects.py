"""Errors in the shape of the API that was asked: OpenAI's everywhere, but on the paths of the other APIs.

An error is made in OpenAI's shape, wherever it comes from (a handler, Falcon, the guard before either), and translated
here, once, on its way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from runner.gateway.errors import anthropic_kind

Translate = Callable[[bytes, int], bytes]
"""A body in OpenAI's shape, and its status, to another shape."""


def anthropic_error(body: bytes, status: int) -> bytes:
    """`{"type": "error", "error": {type, message}}`, the field at fault in front of the message."""
    error = msgspec.json.decode(body)["error"]
    message, param = error["message"], error.get("param")
    if param and param not in message:
        message = f"{param}: {message}"
    return msgspec.json.encode({"type": "error", "error": {"type": anthropic_kind(status), "message": message}})


def ollama_error(body: bytes, status: int) -> bytes:
    """`{"error": message}`."""
    return msgspec.json.encode({"error": msgspec.json.decode(body)["error"]["message"]})


_BY_PREFIX: Final[tuple[tuple[str, Translate], ...]] = (("/v1/messages", anthropic_error), ("/api", ollama_error))


def in_dialect(path: str, body: bytes, status: int) -> bytes:
    """The body of an error, as clients of `path` expect it."""
    for prefix, translate in _BY_PREFIX:
        if path == prefix or path.startswith(f"{prefix}/"):
            return translate(body, status)
    return body
