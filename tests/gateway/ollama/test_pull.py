"""Ollama's pull and tags where a server may download, by what it asks of the runner."""

from __future__ import annotations

import json

import pytest

from runner.errors import HubFailed
from runner.gateway.ollama.pull import Wanted, repository
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Client, client_of, spec_of
from tests.gateway.fakes import FakeControl, FakeDirectory


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def client(directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl) -> Client:
    return client_of(spec_of(apis=("ollama", "admin")), directory, metrics, control)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/a", Wanted("org/a", "")),
        ("org/a:latest", Wanted("org/a", "")),
        ("org/a.b-c_d:v1.2", Wanted("org/a.b-c_d", "v1.2")),
        ("org/a:refs/pr/1", Wanted("org/a", "refs/pr/1")),
        ("hf.co/org/a", Wanted("org/a", "")),
        ("huggingface.co/org/a:main", Wanted("org/a", "main")),
        ("llama3.2", None),
        ("llama3.2:1b", None),
        ("a/b/c", None),
        ("org/a b", None),
        ("", None),
    ],
)
def test_names_of_the_hub(name: str, wanted: Wanted | None) -> None:
    assert repository(name) == wanted


async def test_what_is_served_is_not_fetched(client: Client, control: FakeControl) -> None:
    for name in ("chat", "org/gpt-4o", "chat:pirate"):
        assert (await client.post("/api/pull", {"model": name, "stream": False})).json == {"status": "success"}
    assert control.asked == []


async def test_a_repository_is_fetched_and_told_line_by_line(client: Client, control: FakeControl) -> None:
    answer = await client.post("/api/pull", {"model": "org/new"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    bar = {"status": f"pulling {'c' * 12}", "digest": f"sha1:{'c' * 40}", "total": 10}
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"status": "pulling manifest"},
        {**bar, "completed": 5},
        {**bar, "completed": 10},
        {"status": "org/new is in the hub's cache; an entry of the manifest serves it"},
        {"status": "success"},
    ]
    assert control.asked == [("pull", "org/new", ""), ("pull ended",)]


async def test_a_failure_before_the_first_line_is_a_status_and_after_it_a_line(
    client: Client, control: FakeControl
) -> None:
    control.outcome = HubFailed("the hub is gone", code="E804")
    early = await client.post("/api/pull", {"model": "org/new:v2"})
    assert (early.status_code, early.json) == (502, {"error": "the hub is gone"})
    control.at_once = False
    late = await client.post("/api/pull", {"model": "org/new"})
    assert late.status_code == 200
    assert json.loads(late.text.splitlines()[-1]) == {"error": "the hub is gone"}
    whole = await client.post("/api/pull", {"model": "org/new", "stream": False})
    assert (whole.status_code, whole.json) == (502, {"error": "the hub is gone"})
    assert control.asked.count(("pull ended",)) == 3


async def test_a_page_on_the_web_cannot_fill_the_disk(client: Client, control: FakeControl) -> None:
    """Without a preflight it can only send what a form could."""
    raw = b'{"model": "org/new"}'
    page = {"content-type": "text/plain", "content-length": str(len(raw)), "origin": "https://example.com"}
    assert (await client.request("POST", "/api/pull", [raw], page)).status_code == 415
    assert control.asked == []
    plain = {name: value for name, value in page.items() if name != "origin"}
    assert (await client.request("POST", "/api/pull", [raw], plain)).status_code == 200, "curl -d sends no origin"


async def test_what_is_here_is_listed_beside_what_is_served(client: Client) -> None:
    models = (await client.get("/api/tags")).json["models"]
    assert [model["name"] for model in models] == ["chat", "org/gpt-4o", "chat:pirate", "chat:shout", "org/a"]
    assert (models[-1]["digest"], models[-1]["size"], models[-1]["details"]["family"]) == ("a" * 40, 7, "llama")


async def test_without_the_admin_api_only_what_is_served_is(
    directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl
) -> None:
    client = client_of(spec_of(apis=("ollama",)), directory, metrics, control)
    assert len((await client.get("/api/tags")).json["models"]) == 4
    refused = await client.post("/api/pull", {"model": "org/new"})
    assert refused.status_code == 403
    assert "give it the admin API (apis: [ollama, admin]), or run `mlx-run pull org/new`" in refused.json["error"]
    assert control.asked == []
