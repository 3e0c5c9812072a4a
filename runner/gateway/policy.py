"""Who may ask a listener for what: pure decisions on a request's headers.

Host: a page on the web can point its own name at 127.0.0.1 and so read a local server as if it were same-origin (DNS
rebinding), but its requests still carry that name; an address is never rebound, nor a name that public DNS does not
have (`host.docker.internal`, a service's in a network of containers). CORS: nothing unless the manifest declares
origins. Keys: compared by digest, in constant time, and all of them every time.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Final, NamedTuple

from runner.plan.spec import ListenerSpec

MAX_HEADER_BYTES: Final = 32 * 1024
"""Names and values together. Granian itself refuses more than 100 headers, and 64 KiB before its parser is done."""

OPEN_PATHS: Final = frozenset({"/health", "/openapi.json", "/docs"})
"""What needs no key."""

_NEVER_PUBLIC: Final = (".localhost", ".internal")
"""Endings that are reserved, and so in nobody's power (RFC 6761; ICANN's resolution of July 2024)."""

_EXPOSED: Final = (b"access-control-expose-headers", b"x-request-id, x-mlx-run-adapter")


class Refusal(NamedTuple):
    """Why a request goes no further."""

    status: int
    code: str
    message: str


class Policy:
    """The rules of one listener, as its spec says them. Headers are (lower-case name → value) in bytes."""

    def __init__(self, spec: ListenerSpec) -> None:
        self.max_body_bytes = spec.max_body_bytes
        self._keys = tuple(sha256(key.encode()).digest() for key in spec.api_keys)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in spec.allow_origins)
        self._names = _allowed_names(spec.host)
        self._loopback = _is_loopback(spec.host)
        # A page that rebinds its name has no key, and proxies have names of their own.
        self._any_host = bool(self._keys)

    def refuse_sender(self, headers: Mapping[bytes, bytes], header_bytes: int) -> Refusal | None:
        """The reason to tell a sender nothing at all, or None."""
        if header_bytes > MAX_HEADER_BYTES:
            return Refusal(431, "headers_too_large", f"headers are over the limit of {MAX_HEADER_BYTES} bytes")
        if not self._any_host and not self._host_allowed(headers.get(b"host", b"").decode("latin-1")):
            return Refusal(
                421,
                "host_not_allowed",
                "the Host header is not one of this listener's names (protection against DNS rebinding); "
                "use its address, such as 127.0.0.1",
            )
        return None

    def refuse_request(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """The reason to refuse a request of an acceptable sender, or None."""
        if self._keys and path not in OPEN_PATHS and not self._key_matches(headers):
            return Refusal(401, "invalid_api_key", "no API key, or not a valid one; send `Authorization: Bearer <key>`")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return Refusal(413, "body_too_large", self.body_limit_message)
        return None

    @property
    def body_limit_message(self) -> str:
        """What a body over the limit is answered with, whether its length was announced or counted."""
        return f"the body is over this listener's limit of {self.max_body_bytes} bytes"

    def cors_headers(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What an answer to a declared origin carries; nothing for the others."""
        origin = headers.get(b"origin")
        if origin is None or not self._origins:
            return []
        if "*" in self._origins:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        if origin.decode("latin-1").lower() not in self._origins:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), _EXPOSED]

    def preflight_headers(self, method: str, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]] | None:
        """What the answer to a declared origin's preflight adds to them; None when the request is no such thing."""
        if method != "OPTIONS" or b"access-control-request-method" not in headers or not self.cors_headers(headers):
            return None
        answer = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", headers.get(b"access-control-request-headers", b"content-type")),
            (b"access-control-max-age", b"600"),
        ]
        if b"access-control-request-private-network" in headers:
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    def _host_allowed(self, host: str) -> bool:
        name = _without_port(host)
        if name in self._names or name.endswith(_NEVER_PUBLIC):
            return True
        address = _address(name)
        if address is None:
            return name != "" and "." not in name and not name.isdigit()
        return address.is_loopback or not self._loopback

    def _key_matches(self, headers: Mapping[bytes, bytes]) -> bool:
        authorization = headers.get(b"authorization", b"")
        scheme, _, token = authorization.partition(b" ")
        presented = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = sha256(presented).digest()
        matches = False
        for key in self._keys:
            matches |= compare_digest(key, digest)
        return matches


def _allowed_names(host: str) -> frozenset[str]:
    """Names that mean this machine, for a listener bound to `host`."""
    names = {"localhost", host.lower().strip("[]")}
    if not _is_loopback(host):
        own = socket.gethostname().lower()
        names |= {own, own.split(".", 1)[0], f"{own.split('.', 1)[0]}.local"}
    return frozenset(names)


def _is_loopback(host: str) -> bool:
    address = _address(host.strip("[]"))
    return host == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _without_port(host: str) -> str:
    """`Host` without its port and brackets, lower-case, without the root's dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")
