"""What a token costs between the engine's frame and the HTTP server's `send`: our own code, without sockets.

    python tests/bench/gateway_path.py [--streams 128] [--steps 300]

The connection to an engine, a deployment, the guard, Falcon and OpenAI's stream are the real ones; frames are fed to
the connection, and `send` counts. One thread, and nothing that waits for anything: the least of the steps is what the
code takes, the others tell how busy the machine was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.control.adapter_versions import AdapterVersions  # noqa: E402
from runner.control.connection import EngineConnection  # noqa: E402
from runner.control.deployment import Deployment  # noqa: E402
from runner.gateway.app import build_app  # noqa: E402
from runner.gateway.backend import ModelCard, Route  # noqa: E402
from runner.gateway.guard import Guard  # noqa: E402
from runner.gateway.policy import Policy  # noqa: E402
from runner.plan.spec import ListenerSpec  # noqa: E402
from runner.protocol import Delta, Generate, Step, Usage, decoder_to_engine, encode_frame  # noqa: E402
from runner.telemetry import GatewayMetrics  # noqa: E402


class EngineSide(asyncio.Transport):
    """Where the connection writes: remembers the rows that were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self._decoder = decoder_to_engine()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.rows += [m.id for m in self._decoder.feed(bytes(data)) if isinstance(m, Generate)]

    def is_closing(self) -> bool:
        return False


class Served:
    """A deployment with an engine: only the way of a request through it."""

    loaded = True
    name = "chat"
    ready = True
    stats = None

    def __init__(self, connection: EngineConnection) -> None:
        self.engine = SimpleNamespace(connection=connection)
        self._using = 0
        self._demand = SimpleNamespace(used=lambda: None)
        self._room = SimpleNamespace(touch=lambda: None)
        self._adapters = AdapterVersions()
        self.spec = SimpleNamespace(adapters=())

    def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        return Deployment.generate(self, request)  # type: ignore[arg-type]


class OneModel:
    """A directory with one model."""

    def __init__(self, deployment: Served) -> None:
        self._deployment = deployment

    def resolve(self, listener: str, model: str | None, adapter_name: str | None) -> Route:
        return Route(self._deployment, "chat", None, "", "fp_x", {})

    def cards(self, listener: str) -> list[ModelCard]:
        return []

    def deployments(self, listener: str) -> list[Served]:
        return [self._deployment]


async def step_micros(streams: int, steps: int) -> list[float]:
    """Microseconds a token of each step, in ascending order."""
    connection, engine = EngineConnection(lambda _: None, lambda: None), EngineSide()
    connection.connection_made(engine)
    metrics = GatewayMetrics()
    spec = ListenerSpec(name="lm", host="127.0.0.1", port=0, models=("chat",))
    app = build_app(spec, OneModel(Served(connection)), metrics)
    guard = Guard("lm", Policy(spec), app, metrics)
    sent = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal sent
        sent += 1

    requests = [asyncio.create_task(guard(_scope(), _receive_once(steps), send)) for _ in range(streams)]
    while len(engine.rows) < streams:
        await asyncio.sleep(0)
    frame = encode_frame(Step([Delta(row, " token", 1) for row in engine.rows]))
    times = []
    for _ in range(steps):
        before, began = sent, time.perf_counter()
        connection.data_received(frame)
        while sent < before + streams:
            await asyncio.sleep(0)
        times.append((time.perf_counter() - began) / streams * 1e6)
    connection.data_received(
        encode_frame(Step([Delta(row, ".", 1, "length", Usage(1, steps + 1)) for row in engine.rows]))
    )
    await asyncio.gather(*requests)
    return sorted(times[1:])  # the first brings the heads too


def _body(tokens: int) -> bytes:
    message = {"role": "user", "content": "hi"}
    return json.dumps({"model": "chat", "messages": [message], "max_tokens": tokens, "stream": True}).encode()


def _scope() -> dict[str, Any]:
    headers = {"host": "127.0.0.1:8080", "content-type": "application/json"}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", "8080"),
        "client": ("127.0.0.1", 50000),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


def _receive_once(tokens: int) -> Any:
    messages = [{"type": "http.request", "body": _body(tokens), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError("nobody leaves here")

    return receive


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    times = asyncio.run(step_micros(options.streams, options.steps))
    print(f"{options.streams} streams: least {times[0]:.1f}, median {times[len(times) // 2]:.1f} µs a token")


if __name__ == "__main__":
    main()
