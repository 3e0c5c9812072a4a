"""What is asked of whom: the messages between the command and its worker processes."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec

from runner.errors import RunnerError

SHARED_PREFIX_INDEX = -1
"""The prompt number whose words all requests of a run share at their beginning."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server. `base` is the path before `/chat/completions`; `model` is left out of requests when empty."""

    host: str
    port: int
    tls: bool = False
    base: str = "/v1"
    api_key: str = ""
    model: str = ""
    usage: bool = True
    """Whether to ask for usage in streams (`stream_options`); some servers refuse the field."""

    @property
    def authority(self) -> str:
        """Host and port as in a URL, and in the Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """As it is printed."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base}"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of request. Lengths of prompts are in words; what a word is in tokens is calibrated per server."""

    words: int
    shared_words: int = 0
    max_tokens: int = 128
    spread: float = 0.0
    """By how much of `max_tokens` answers' lengths differ from it at most, both ways: by the request's number."""
    body: dict[str, Any] = {}
    """Further fields of each request: temperature, top_p, …"""
    adapters: tuple[str, ...] = ()
    """Taken in turn, one a request; an empty name is the plain model."""
    adapter_field: str = "adapter_name"
    seed: int = 0
    timeout: float = 300.0
    """Seconds that one request may take."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's share of a level.

    Its requests are number `first`, `first + stride`, … below `end`; none begins more than `duration` seconds after the
    first, and what has not ended `limit` seconds after it is given up.
    """

    target: Target
    load: Load
    clients: int
    first: int
    stride: int = 1
    end: int
    duration: float | None = None
    limit: float | None = None


class Outcome(msgspec.Struct, kw_only=True):
    """One request. Times are seconds, `began` and `ended` on time.perf_counter's clock, which a machine's processes
    share.

    `error` is a kind of failure (`connect`, `reset`, `http_503`, …), empty for none. `unfinished` is one that was given
    up because the level's time was over; it `ended` with its last token. `chunks` counts stream events with content.
    Token counts are the server's, None where it gave none.
    """

    index: int
    began: float
    ended: float = 0.0
    ttft: float | None = None
    chunks: int = 0
    streamed: bool = True
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""
    message: str = ""


class Report(msgspec.Struct, kw_only=True):
    """What one worker measured. `gaps` are all seconds between two content events of a request, as packed float64.

    `left` counts the requests that never began because the level's time was over.
    """

    outcomes: list[Outcome]
    gaps: bytes
    cpu_seconds: float
    stopped: bool
    left: int = 0


def target_of(url: str, *, api_key: str = "", model: str = "") -> Target:
    """The server at `http(s)://host[:port][/path]`; the path is /v1 where there is none. Raises RunnerError."""
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise RunnerError(f"{url!r} is no address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RunnerError(f"{url!r} is no address", hint="Say http://127.0.0.1:8080, with or without /v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    tls = parts.scheme == "https"
    default = 443 if tls else 80
    return Target(host=parts.hostname, port=port or default, tls=tls, base=path or "/v1", api_key=api_key, model=model)
