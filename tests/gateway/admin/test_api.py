"""The admin API's routes: what is asked of the runner, and how it answers."""

from __future__ import annotations

from typing import Any

import pytest

from runner import errors
from runner.gateway.admin.control import By
from runner.plan.scope import Scope
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Client, client_of, spec_of
from tests.gateway.fakes import FakeControl, FakeDirectory

BY = By("servers.lm")


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def client(directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl) -> Client:
    return client_of(spec_of(apis=("openai", "admin")), directory, metrics, control)


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        ("plan", {}, ("plan", Scope())),
        ("plan", {"target": ["chat"], "prune": False}, ("plan", Scope(("chat",), prune=False))),
        ("apply", {}, ("apply", Scope(), BY, None)),
        ("apply", {"generation": 4, "timeout_seconds": 9}, ("apply", Scope(), By("servers.lm", 4), 9.0)),
        ("models/load", {"model": "a"}, ("load_model", "a", None, ("lm",), BY)),
        (
            "models/load",
            {"model": "a", "source": "./a", "revision": "main", "config": {"aliases": ["b"]}, "servers": ["x"]},
            ("load_model", "a", {"source": "./a", "revision": "main", "aliases": ["b"]}, ("x",), BY),
        ),
        ("models/unload", {"model": "a", "generation": 3}, ("unload_model", "a", By("servers.lm", 3))),
        ("adapters/load", {"model": "a", "adapter": "b"}, ("load_adapter", "a", "b", None, BY)),
        (
            "adapters/load",
            {"model": "a", "adapter": "b", "source": "./b", "scale": 2},
            ("load_adapter", "a", "b", {"source": "./b", "scale": 2.0}, BY),
        ),
        ("adapters/unload", {"model": "a", "adapter": "b"}, ("unload_adapter", "a", "b", BY)),
    ],
)
async def test_each_route_asks_for_what_it_says(
    client: Client, control: FakeControl, path: str, body: Any, asked: tuple[Any, ...]
) -> None:
    answer = await client.post(f"/v1/{path}", body)
    assert (answer.status_code, control.asked) == (200, [asked])
    assert answer.json == {"generation": 3, "seconds": 0.25, "drift": ["models.x loaded"], "plan": {"actions": []}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": ""}, "model"),
        ({"model": "a/b"}, "model"),
        ({"model": "a", "config": {"aliases": []}}, "source"),
        ({"model": "a", "revision": "main"}, "source"),
        ({"model": "a", "source": "./a", "config": {"source": "./b"}}, "config.source"),
        ({"model": "a", "source": "./a", "config": {"adapters": ["b"]}}, "config.adapters"),
        ({"model": "a", "source": "./a", "config": {"trust_remote_code": True}}, "config.trust_remote_code"),
        (
            {"model": "a", "source": "./a", "config": {"draft": {"source": "./b", "trust_remote_code": True}}},
            "config.draft.trust_remote_code",
        ),
        ({"model": "a", "sources": "./a"}, "sources"),
        ({"model": "a", "generation": -1}, "generation"),
    ],
)
async def test_a_wrong_body_names_its_field(client: Client, control: FakeControl, body: Any, param: str) -> None:
    answer = await client.post("/v1/models/load", body)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param)
    assert control.asked == []


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.StaleGeneration("by now it is 5"), 409, "stale_generation"),
        (errors.Conflict("no", code="not_in_sync"), 409, "not_in_sync"),
        (errors.Interrupted("too slow"), 409, "timed_out"),
        (errors.SourceChanged("files changed"), 409, "source_changed"),
        (errors.ListenerError("taken"), 409, "conflict"),
        (errors.RunnerError("no room", hint="make some"), 409, "conflict"),
        (errors.ManifestError([errors.Diagnostic("dev.yaml", 1, 2, "models.a", "is odd", code="E601")]), 422, "E601"),
        (errors.EngineLoadError("no such architecture"), 422, "cannot_load"),
        (errors.NotServed("unknown", param="model", code="model_not_found"), 404, "model_not_found"),
        (errors.EngineDied("it died"), 500, None),
    ],
)
async def test_every_way_to_fail_has_its_status(
    client: Client, control: FakeControl, error: errors.MlxRunError, status: int, code: str | None
) -> None:
    control.outcome = error
    answer = await client.post("/v1/apply", {})
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert error.message in answer.json["error"]["message"]


async def test_plan_and_apply_need_no_body(client: Client, control: FakeControl) -> None:
    for path in ("/v1/plan", "/v1/apply"):
        assert (await client.request("POST", path, headers={"content-length": "0"})).status_code == 200
    page = {"content-length": "0", "origin": "https://example.com"}
    assert (await client.request("POST", "/v1/apply", headers=page)).status_code == 415
    assert (await client.post("/v1/apply", b"target=x", "application/x-www-form-urlencoded")).status_code == 415
    assert len(control.asked) == 2


async def test_it_is_not_there_unless_the_server_has_it(
    directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl
) -> None:
    client = client_of(spec_of(apis=("openai",)), directory, metrics, control)
    for path in ("/v1/plan", "/v1/apply", "/v1/models/load", "/v1/adapters/unload"):
        assert (await client.post(path, {})).status_code in (404, 405)
    assert (await client.get("/v1/status")).status_code == 404
    assert control.asked == []


async def test_keys_hold_for_it_as_for_the_rest(
    directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl
) -> None:
    client = client_of(spec_of(apis=("admin",), api_keys=("secret",)), directory, metrics, control)
    assert (await client.post("/v1/apply", {})).status_code == 401
    assert (await client.get("/v1/status")).status_code == 401
    assert (await client.get("/v1/models/available")).status_code == 401
    assert (await client.get("/v1/status", authorization="Bearer secret")).json == {"name": "dev"}
    assert control.asked == []


async def test_what_is_available_is_no_model_of_that_name(client: Client) -> None:
    assert (await client.get("/v1/models/available")).json == {"models": [{"source": "org/a"}], "notes": []}


async def test_a_search_asks_for_what_the_query_says(client: Client, control: FakeControl) -> None:
    answer = await client.get("/v1/models/search?q=llama+1b%204bit")
    assert (answer.status_code, answer.json) == (200, {"models": [{"repo": "org/a", "fits": True}]})
    assert (await client.get("/v1/models/search?limit=3&q=%20x%20")).status_code == 200
    assert control.asked == [("search", "llama 1b 4bit", 20), ("search", "x", 3)]


@pytest.mark.parametrize(
    ("query", "param", "says"),
    [
        ("", "q", "is missing"),
        ("?q=", "q", "is missing"),
        ("?q=+", "q", "is missing"),
        (f"?q={'x' * 257}", "q", "longer than 256"),
        ("?q=a&q=b", "q", "more than once"),
        ("?q=a&limit=0", "limit", "from 1 to 100"),
        ("?q=a&limit=101", "limit", "from 1 to 100"),
        (f"?q=a&limit={'9' * 5000}", "limit", "from 1 to 100"),
        ("?q=a&limit=-1", "limit", "from 1 to 100"),
        ("?query=a", "query", "there are: q, limit"),
    ],
)
async def test_a_wrong_query_names_its_parameter(
    client: Client, control: FakeControl, query: str, param: str, says: str
) -> None:
    answer = await client.get(f"/v1/models/search{query}")
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param)
    assert says in answer.json["error"]["message"]
    assert control.asked == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(errors.Unavailable("offline", code="E801"), 503), (errors.HubFailed("unreachable", code="E804"), 502)],
)
async def test_a_hub_that_gives_no_answer_has_a_status_of_its_own(
    client: Client, control: FakeControl, error: errors.RequestError, status: int
) -> None:
    control.outcome = error
    answer = await client.get("/v1/models/search?q=a")
    assert (answer.status_code, answer.json["error"]["code"]) == (status, error.code)


async def test_other_apis_stay_beside_it(client: Client) -> None:
    assert (await client.get("/v1/models")).json["data"][0]["id"] == "chat"
    assert (await client.get("/v1/models/chat")).json["id"] == "chat"
    assert (await client.chat()).status_code == 200
