from __future__ import annotations

import json
import subprocess
import sys

from prometheus_client.parser import text_string_to_metric_families

from runner.gateway.listener import Listener
from runner.protocol import Stats
from tests.gateway.conftest import Client, Connect
from tests.gateway.fakes import FakeDeployment
from tests.gateway.wire import get

STATS = Stats(
    rows=3,
    prefilling=1,
    waiting=2,
    adapters=["key-pirate"],
    active_bytes=1000,
    peak_bytes=2000,
    cache_bytes=10,
    prefix_cache_bytes=20,
    prompt_tokens_total=100,
    cached_tokens_total=40,
    completion_tokens_total=70,
    steps_total=60,
    cancelled_total=5,
    failed_total=6,
    drafted_tokens_total=50,
    accepted_tokens_total=30,
)


async def test_ready_when_each_model_has_generated(client: Client, deployment: FakeDeployment) -> None:
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json["status"], ready.json["models"]) == (200, "ready", {"chat": True})
    deployment.ready = False
    loading = await client.get("/ready")
    assert (loading.status_code, loading.json["not_ready"]) == (503, ["chat"])
    assert loading.headers["retry-after"] == "1"


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Prometheus text as its own parser reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_requests_tokens_and_times(client: Client, deployment: FakeDeployment) -> None:
    await client.chat()
    await client.chat(stream=True)
    await client.chat(temprature=1)
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(response.text)
    chat = (("listener", "lm"), ("model", "chat"), ("route", "/v1/chat/completions"), ("status", "200"))
    assert found["mlx_run_requests_total", chat] == 2
    refused = (("listener", "lm"), ("model", ""), ("route", "/v1/chat/completions"), ("status", "400"))
    assert found["mlx_run_requests_total", refused] == 1
    model = (("model", "chat"),)
    assert found["mlx_run_completion_tokens_total", model] == 4
    assert found["mlx_run_prompt_tokens_total", model] == 14
    assert found["mlx_run_cached_prompt_tokens_total", model] == 6
    assert found["mlx_run_time_to_first_token_seconds_count", model] == 2
    assert found["mlx_run_inter_token_seconds_count", model] == 2
    assert found["mlx_run_request_seconds_count", (("route", "/v1/chat/completions"),)] == 3
    assert found["mlx_run_requests_in_flight", (("listener", "lm"),)] == 1, "the one that asks"
    assert found["mlx_run_model_ready", model] == 1


async def test_metrics_have_the_engines_own_counters(client: Client, deployment: FakeDeployment) -> None:
    assert "mlx_run_engine_rows{" not in (await client.get("/metrics")).text
    deployment.stats = STATS
    found = samples((await client.get("/metrics")).text)
    model = (("model", "chat"),)
    for name, value in (
        ("rows", 3),
        ("prefilling", 1),
        ("waiting", 2),
        ("active_bytes", 1000),
        ("peak_bytes", 2000),
        ("cache_bytes", 10),
        ("prefix_cache_bytes", 20),
        ("prompt_tokens_total", 100),
        ("cached_tokens_total", 40),
        ("completion_tokens_total", 70),
        ("steps_total", 60),
        ("cancelled_total", 5),
        ("failed_total", 6),
        ("drafted_tokens_total", 50),
        ("accepted_tokens_total", 30),
    ):
        assert found[f"mlx_run_engine_{name}", model] == value


async def test_metrics_count_open_connections(listener: Listener, connect: Connect) -> None:
    first = await connect(listener)
    await first.send(get("/health"))
    assert await first.status() == 200
    second = await connect(listener)
    await second.send(get("/metrics"))
    assert await second.status() == 200
    text = (await second.until(b"mlx_run_model_ready")).decode()
    assert 'mlx_run_open_connections{listener="lm"} 2.0' in text


def test_opening_a_listener_imports_neither_falcon_nor_prometheus() -> None:
    """Start-up time: the port opens, and /health answers, before either is there."""
    code = "import sys, json, runner.gateway.listener; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert "granian.server.embed" in modules
    assert not modules & {"falcon", "prometheus_client", "psutil", "pydantic", "mlx", "httpx", "email"}
