"""The OpenAPI document is about what is there, all of it, and made from what decodes requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import falcon.asgi
import pytest

from runner.gateway import openapi
from runner.gateway.app import build_app
from runner.gateway.openai import wire
from runner.gateway.openai.resources import OTHER_KINDS
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import client_of, spec_of
from tests.gateway.fakes import FakeControl, FakeDirectory

COMMITTED = Path(__file__).parents[2] / "schemas/openapi.json"
APIS = ("openai", "anthropic", "ollama", "admin")


def routes(app: falcon.asgi.App[Any, Any]) -> Iterator[tuple[str, str]]:
    """(method, path) of every route of an app that does something, as Falcon's own inspection lists them."""
    from falcon.inspect import inspect_routes

    for route in inspect_routes(app):
        for method in route.methods:
            if not method.internal and method.method not in ("OPTIONS", "HEAD"):
                yield method.method.lower(), route.path.replace(":path}", "}")


UNDOCUMENTED = {
    ("get", "/"),
    ("post", "/v1/responses/{response_id}"),  # only says that it is not there
    *(("post", path) for path in OTHER_KINDS),  # they say what is
    *(
        (method, f"/api/{name}")
        for method in ("post", "delete")
        for name in ("copy", "delete", "push", "embed", "embeddings")
    ),
}


def test_every_route_is_in_the_document_and_the_other_way_round(
    directory: FakeDirectory, metrics: GatewayMetrics
) -> None:
    app = build_app(spec_of(apis=APIS), directory, metrics, FakeControl())
    documented = {(method, path) for path, methods in openapi.document(APIS)["paths"].items() for method in methods}
    assert documented - {("get", "/health")} == set(routes(app)) - UNDOCUMENTED


def test_the_committed_document_is_the_one_that_is_made() -> None:
    assert json.loads(COMMITTED.read_text()) == openapi.document(APIS)


def test_fields_come_from_the_types_that_decode() -> None:
    schemas = openapi.document(["openai"])["components"]["schemas"]
    chat = schemas["ChatRequest"]
    assert set(chat["properties"]) == set(wire.ChatRequest.__struct_fields__)
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is False


async def test_a_server_tells_only_of_its_own_apis(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    client = client_of(spec_of(apis=("anthropic",)), directory, metrics)
    paths = (await client.get("/openapi.json")).json["paths"]
    assert "/v1/messages" in paths
    assert "/v1/chat/completions" not in paths


async def test_with_keys_the_document_says_so_and_is_itself_open(
    directory: FakeDirectory, metrics: GatewayMetrics
) -> None:
    client = client_of(spec_of(apis=APIS, api_keys=("secret",)), directory, metrics, FakeControl())
    answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.json["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    for path in ("/health", "/docs", "/openapi.json"):
        assert "security" not in answer.json["paths"][path]["get"]
        assert "401" not in answer.json["paths"][path]["get"]["responses"]
        assert (await client.get(path)).status_code == 200
    assert "secret" not in answer.text
    assert (await client.get("/v1/models")).status_code == 401


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")] + (
            [tag] if tag == "script" else []
        )


async def test_the_page_needs_nothing_from_elsewhere(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    page = (await client_of(spec_of(apis=APIS), directory, metrics, FakeControl()).get("/docs")).text
    links = Links()
    links.feed(page)
    assert links.found == []
    for path in openapi.document(APIS)["paths"]:
        assert path in page
    search = page.partition("/v1/models/search")[2].partition("</details>")[0]
    assert '<td class="need"><code>q</code></td>' in search
    assert "<td><code>limit</code></td>" in search


@pytest.mark.parametrize("api", APIS)
def test_every_operation_says_what_it_answers(api: str) -> None:
    for path, methods in openapi.document([api])["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert "200" in operation["responses"]
