"""Models and adapters by the admin API, on real engines: loaded, used, kept by `mlx-run adopt`, or gone with apply."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.stories.harness import MODELS, Bench, until

pytestmark = [pytest.mark.story, pytest.mark.mlx]

SUM = "What is 17 + 25?"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.write({"shout": "./adapters/shout"})
    text = made.manifest.read_text().replace(f"{{port: {made.port}}}", f"{{port: {made.port}, apis: [openai, admin]}}")
    made.save(text.replace("  demo-chat:\n", "  # what people talk to\n  demo-chat:  # the large one\n"))
    with made.serving():
        yield made
    made.close()


def post(bench: Bench, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{bench.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def say(bench: Bench, model: str) -> str:
    answer = bench.client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": SUM}], temperature=0, max_tokens=40
    )
    return answer.choices[0].message.content or ""


def test_loaded_used_and_reverted(bench: Bench) -> None:
    engine = bench.model()["pid"]
    post(bench, "/v1/models/load", model="small", source=str(MODELS / "demo-draft"))
    assert say(bench, "small")
    post(bench, "/v1/adapters/load", model="demo-chat", adapter="sailor", source="./adapters/pirate")
    assert say(bench, "demo-chat:sailor") == "Arr! 17 + 25 be 42, matey."
    post(bench, "/v1/adapters/unload", model="demo-chat", adapter="shout")
    with pytest.raises(openai.NotFoundError):
        say(bench, "demo-chat:shout")
    assert bench.model()["pid"] == engine
    there = httpx.get(f"{bench.url}/v1/models/available", timeout=60).json()["models"]
    assert {str(MODELS / "demo-chat"), str(MODELS / "demo-draft")} <= {one["source"] for one in there}
    drift = "models.small loaded, models.demo-chat.adapters.sailor loaded, models.demo-chat.adapters.shout unloaded"
    assert f"Drift: {drift} by the admin API." in bench.run("status", "dev").stdout
    planned = bench.run("plan", str(bench.manifest)).stdout
    assert f"Drift, by the admin API: {drift}." in planned
    assert "- models.small" in planned
    assert bench.run("apply", str(bench.manifest)).returncode == 0
    assert bench.status()["in_sync"]
    with pytest.raises(openai.NotFoundError, match="small"):
        say(bench, "small")
    assert say(bench, "demo-chat:shout") == "17 + 25 = 42!!!"


def test_adopted(bench: Bench) -> None:
    engine = bench.model()["pid"]
    before = bench.manifest.read_text()
    post(bench, "/v1/models/load", model="small", source=str(MODELS / "demo-draft"), config={"aliases": ["tiny"]})
    post(bench, "/v1/adapters/load", model="demo-chat", adapter="sailor", source="./adapters/pirate")
    small = bench.status()["models"][-1]["pid"]
    shown = bench.run("adopt", "--dry-run")
    assert (shown.returncode, bench.manifest.read_text()) == (0, before)
    assert "+  small:" in shown.stdout
    done = bench.run("adopt", "dev")
    assert "Adopted: models.small loaded" in done.stdout, done.stderr
    after = bench.manifest.read_text()
    assert [line for line in after.splitlines() if line in before.splitlines()] == before.splitlines()
    status = bench.status()
    assert (status["in_sync"], status["changes"], status["manifest_error"]) == (True, None, "")
    assert {m["name"]: m["pid"] for m in status["models"]} == {"demo-chat": engine, "small": small}
    assert "nothing to do" in bench.run("plan", str(bench.manifest)).stdout
    assert "nothing to adopt" in bench.run("adopt", "dev").stdout
    assert say(bench, "demo-chat:sailor") == "Arr! 17 + 25 be 42, matey."
    assert say(bench, "tiny")


def test_a_model_rests_and_an_edit_brings_it_back(bench: Bench) -> None:
    engine = bench.model()["pid"]
    post(bench, "/v1/models/unload", model="demo-chat")
    with pytest.raises(openai.NotFoundError, match="was unloaded"):
        say(bench, "demo-chat")
    assert bench.run("adopt", "dev").returncode == 1, "a manifest has one model at least"
    bench.save(bench.manifest.read_text() + "# an edit\n")
    until(lambda: bench.status()["in_sync"])
    assert say(bench, "demo-chat") == "17 + 25 = 42."
    assert bench.model()["pid"] != engine
