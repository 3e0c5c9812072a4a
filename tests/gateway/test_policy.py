from __future__ import annotations

import hmac

import pytest

from runner.gateway import policy as policy_module
from runner.gateway.policy import MAX_HEADER_BYTES, Policy
from tests.gateway.conftest import spec_of


def status(policy: Policy, **headers: str) -> int:
    """What a request with these headers is refused with, 0 for not at all."""
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    refusal = policy.refuse_sender(sent, 100) or policy.refuse_request("/v1/models", sent)
    return refusal.status if refusal else 0


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8080",
        "localhost:8080",
        "LOCALHOST",
        "127.9.9.9",
        "[::1]:8080",
        "[::1]",
        "app.localhost:1",
        "host.docker.internal:8080",
        "mlx-run:8080",
    ],
)
def test_loopback_listener_takes_its_own_names(host: str) -> None:
    assert status(Policy(spec_of()), host=host) == 0


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.1.5",
        "",
        "[::2]",
        "2130706433",
        "internal.evil.example",
        "evilinternal.example",
    ],
)
def test_loopback_listener_refuses_rebound_names(host: str) -> None:
    assert status(Policy(spec_of()), host=host) == 421


def test_with_keys_a_proxy_may_keep_its_own_name() -> None:
    """Caddy and tunnels send on the name they were asked by. A page that rebinds its name has no key."""
    policy = Policy(spec_of(api_keys=("k",)))
    assert status(policy, host="llm.example.com", authorization="Bearer k") == 0
    assert status(policy, host="llm.example.com") == 401


def test_no_host_header_is_refused() -> None:
    assert status(Policy(spec_of())) == 421


def test_open_listener_without_keys_takes_addresses_and_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module.socket, "gethostname", lambda: "Box.lan")
    policy = Policy(spec_of(host="0.0.0.0"))
    for host in ("192.168.1.5:8080", "10.0.0.2", "localhost", "box.lan", "box", "box.local:8080", "[fe80::1]:8080"):
        assert status(policy, host=host) == 0, host
    assert status(policy, host="evil.example") == 421


def test_open_listener_with_keys_takes_any_name_but_not_without_a_key() -> None:
    policy = Policy(spec_of(host="0.0.0.0", api_keys=("k",)))
    assert status(policy, host="llm.example.com", authorization="Bearer k") == 0
    assert status(policy, host="llm.example.com") == 401


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"authorization": "Bearer one"}, 0),
        ({"authorization": "bearer two"}, 0),
        ({"authorization": "Bearer  two "}, 0),
        ({"x_api_key": "two"}, 0),
        ({"authorization": "Basic abc", "x_api_key": "one"}, 0),
        ({"authorization": "Bearer schlüssel"}, 0),
        ({}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer on"}, 401),
        ({"authorization": "Bearer onetwo"}, 401),
        ({"authorization": "one"}, 401),
        ({"x_api_key": ""}, 401),
    ],
)
def test_keys(headers: dict[str, str], expected: int) -> None:
    policy = Policy(spec_of(api_keys=("one", "two", "schlüssel")))
    assert status(policy, host="localhost", **headers) == expected


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(len(left))
        assert len(left) == len(right), "digests, so that lengths tell nothing"
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(policy_module, "compare_digest", compare)
    policy = Policy(spec_of(api_keys=("first", "second", "third")))
    assert status(policy, host="localhost", authorization="Bearer first") == 0
    assert len(compared) == 3, "the first match does not end the comparison"


def test_limits() -> None:
    policy = Policy(spec_of(max_body_bytes=1000))
    assert status(policy, host="localhost", content_length="1000") == 0
    assert status(policy, host="localhost", content_length="1001") == 413
    refusal = policy.refuse_sender({b"host": b"localhost"}, MAX_HEADER_BYTES + 1)
    assert refusal is not None
    assert refusal.status == 431


ORIGIN = b"https://app.example"


def test_no_cors_unless_declared() -> None:
    policy = Policy(spec_of())
    headers = {b"origin": ORIGIN, b"access-control-request-method": b"POST"}
    assert policy.cors_headers(headers) == []
    assert policy.preflight_headers("OPTIONS", headers) is None


def test_cors_for_declared_origins_only() -> None:
    policy = Policy(spec_of(allow_origins=("https://app.example",)))
    asked = {b"access-control-request-method": b"POST", b"access-control-request-headers": b"authorization"}
    allowed = dict(policy.cors_headers({b"origin": ORIGIN}))
    assert allowed[b"access-control-allow-origin"] == ORIGIN
    assert allowed[b"vary"] == b"Origin"
    assert policy.cors_headers({b"origin": b"https://evil.example"}) == []
    assert policy.preflight_headers("OPTIONS", {b"origin": b"https://evil.example", **asked}) is None
    preflight = dict(policy.preflight_headers("OPTIONS", {b"origin": ORIGIN, **asked}) or ())
    assert preflight[b"access-control-allow-headers"] == b"authorization"
    methods = preflight[b"access-control-allow-methods"].split(b", ")
    assert {b"GET", b"HEAD", b"POST", b"DELETE"} <= set(methods), "what the APIs have"
    assert policy.preflight_headers("POST", {b"origin": ORIGIN, **asked}) is None
    private = {b"origin": ORIGIN, **asked, b"access-control-request-private-network": b"true"}
    assert (b"access-control-allow-private-network", b"true") in (policy.preflight_headers("OPTIONS", private) or [])


def test_cors_for_all() -> None:
    policy = Policy(spec_of(allow_origins=("*",)))
    assert (b"access-control-allow-origin", b"*") in policy.cors_headers({b"origin": ORIGIN})
