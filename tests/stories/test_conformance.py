"""What schemathesis finds against `/openapi.json` of a server with every API, the admin's too. Run by hand:

pip install -e '.[clients]'
MLX_RUN_TEST_SECONDS=600 pytest -m nightly tests/stories/test_conformance.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stories.harness import MODELS, Bench

pytestmark = [pytest.mark.story, pytest.mark.mlx, pytest.mark.nightly, pytest.mark.timeout(900)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with names that mean something in place of any text: most requests would be for models that are not
    there, and the admin API would look for any repository that comes to mind."""
    small = str(MODELS / "demo-draft")
    names: dict[str, list[Any]] = {
        "model": ["demo-chat", "demo-chat:pirate", "small", "nowhere"],
        "adapter": ["pirate", "shout", "more"],
        "source": [small, "./adapters/shout", "./nowhere", None],
        "adapter_name": ["pirate", "none", None],
    }
    for schema in document["components"]["schemas"].values():
        for field, values in names.items():
            if field in schema.get("properties", {}):
                schema["properties"][field] = {"enum": values}
    return document


def test_no_server_error_and_nothing_that_the_document_does_not_say(tmp_path: Path) -> None:
    """All but Ollama's create and the hub's search, whose answers here are a documented 501 and, offline, 503."""
    pytest.importorskip("schemathesis")
    bench = Bench(tmp_path)
    bench.environment["HF_HUB_OFFLINE"] = "1"
    bench.write(model_extra="    generation: {max_tokens: 8}\n")
    apis = "apis: [openai, anthropic, ollama, admin]"
    bench.save(bench.manifest.read_text().replace(f"{{port: {bench.port}}}", f"{{port: {bench.port}, {apis}}}"))
    seconds = os.environ.get("MLX_RUN_TEST_SECONDS", "60")
    command = [Path(sys.executable).with_name("schemathesis"), "run", "narrowed.json", "--url", bench.url]
    command += ["--checks", ",".join(CHECKS), "--max-time", seconds, "--request-timeout", "60"]
    command += ["--exclude-path", "/api/create", "--exclude-path", "/v1/models/search", "--continue-on-failure"]
    with bench.serving() as runner:
        document = httpx.get(f"{bench.url}/openapi.json").json()
        (tmp_path / "narrowed.json").write_text(json.dumps(narrowed(document)))
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=850, check=False)
        assert done.returncode == 0, done.stdout[-20_000:]
        assert runner.poll() is None
        assert bench.status()["manifest_error"] == ""
        print(done.stdout[-2000:])
    bench.close()
