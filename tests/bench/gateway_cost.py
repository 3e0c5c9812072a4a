"""What a token costs the runner's process: CPU from the engine's frame to the client's socket.

    python tests/bench/gateway_cost.py [--streams 128] [--tokens 400] [--step-ms 20] [--repeat 3]

A runner with a stand-in engine (this file again, with --spec and --socket) that sends one frame a step with a token of
every row, as the real one does, at a steady pace. The load generator reads the streams. CPU time is the runner
process's own, user and system; what a request costs beside its tokens is measured with answers of one token and taken
off. With --bare, what the HTTP server takes of that: Granian in a process without anything of ours, at the same pace.
`gateway_path.py` has the rest, our own code from the frame to the call of `send`, without sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import psutil  # noqa: E402

from runner.bench.figures import level_of  # noqa: E402
from runner.bench.job import Job, Load, Target  # noqa: E402
from runner.bench.workers import Workers  # noqa: E402
from runner.gateway.embedded import EmbeddedServer  # noqa: E402
from runner.gateway.sockets import bind  # noqa: E402
from runner.protocol import Delta, EngineSpec, Generate, Step, ToEngine, Usage  # noqa: E402
from tests.bench.servers import environment, free_port, process, wait_until  # noqa: E402
from tests.control.scene import write_safetensors  # noqa: E402
from tests.fake_engine import FakeEngine  # noqa: E402

STEP = "MLX_BENCH_STEP_SECONDS"
"""Environment variable: the stand-in engine's pace."""

CHUNK = (
    b"data: " + json.dumps({"id": 24 * "x", "model": "chat", "choices": [{"delta": {"content": " token"}}]}).encode()
)
CHUNK += b" " * (250 - len(CHUNK)) + b"\n\n"
"""An event as long as those of the gateway."""


class SteadyEngine(FakeEngine):
    """A token for every row, every STEP seconds, in one frame."""

    def __init__(self, spec: EngineSpec, seconds: float) -> None:
        super().__init__(spec, {})
        self._seconds = seconds
        self._left: dict[int, tuple[int, int]] = {}

    def handle(self, message: ToEngine) -> None:
        """Rows are answered by `pace`, the rest as ever."""
        if isinstance(message, Generate):
            self._left[message.id] = (message.max_tokens, message.max_tokens)
        else:
            super().handle(message)

    async def pace(self) -> None:
        """Steps for ever, each at its time: one that comes late is followed by the next sooner."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            if self._left:
                self.send(Step(self._step()))

    def _step(self) -> list[Delta]:
        deltas = []
        for row, (left, asked) in list(self._left.items()):
            if left > 1:
                self._left[row] = (left - 1, asked)
                deltas.append(Delta(row, " token", 1))
            else:
                del self._left[row]
                deltas.append(Delta(row, " token", 1, "length", Usage(20, asked)))
        return deltas


async def serve(spec: Path, socket: Path) -> None:
    """The stand-in engine's process."""
    engine = SteadyEngine(msgspec.json.decode(spec.read_bytes(), type=EngineSpec), float(os.environ[STEP]))
    server = await asyncio.start_unix_server(engine.serve, str(socket))
    async with server, asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.pace())
        await engine.connected.wait()
        await engine.gone.wait()
        os._exit(0)


async def serve_bare(port: int, seconds: float) -> None:
    """Granian with an application that writes a chunk to every stream each step."""
    waiting: list[asyncio.Future[None]] = []
    loop = asyncio.get_running_loop()

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(json.loads(body)["max_tokens"] if body else 0):
            waiting.append(loop.create_future())
            await waiting[-1]
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    server = EmbeddedServer(application, bind("127.0.0.1", port))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        due = loop.time()
        while True:
            due = max(due + seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            now, waiting[:] = waiting[:], []
            for future in now:
                future.set_result(None)


def measure_bare(options: argparse.Namespace) -> None:
    """The same load on the HTTP server alone."""
    with tempfile.TemporaryDirectory() as scratch, Workers(1) as workers:
        target = Target(host="127.0.0.1", port=free_port())
        command = [sys.executable, __file__, "--bare", "--step-ms", str(options.step_ms), "--port", str(target.port)]
        with process(command, Path(scratch, "log"), environment()) as server:
            wait_until(target, "/", 200, server, Path(scratch, "log"))
            costs = [cost(workers, target, server.pid, options) for _ in range(options.repeat)]
            print(f"the HTTP server alone: median {statistics.median(costs):.1f}, least {min(costs):.1f} µs a token")


def measure(options: argparse.Namespace) -> None:
    """Start, load, print."""
    with tempfile.TemporaryDirectory() as scratch, Workers(1) as workers:
        folder = Path(scratch)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
        write_safetensors(folder / "model" / "model.safetensors", {"weight": [4, 4]})
        port = free_port()
        manifest = folder / "cost.yaml"
        manifest.write_text(
            f"name: cost\nservers: {{lm: {{port: {port}}}}}\nmodels:\n  chat:\n    source: ./model\n"
            f"    batching: {{max_rows: {options.streams}}}\n"
        )
        more = {
            "MLX_RUN_STATE_DIR": str(folder / "state"),
            "MLX_RUN_ENGINE_COMMAND": shlex.join([sys.executable, __file__]),
            STEP: str(options.step_ms / 1000),
        }
        command = [sys.executable, "-P", "-m", "runner.cli.main", "apply", str(manifest)]
        target, log = Target(host="127.0.0.1", port=port, model="chat"), folder / "log"
        with process(command, log, environment(**more)) as runner:
            wait_until(target, "/ready", 200, runner, log)
            if options.profile:
                print(f"runner: pid {runner.pid}", flush=True)
            costs = [cost(workers, target, runner.pid, options) for _ in range(options.repeat)]
            print(f"median {statistics.median(costs):.1f}, least {min(costs):.1f} µs a token")


def cost(workers: Workers, target: Target, pid: int, options: argparse.Namespace) -> float:
    """Microseconds of the runner's CPU a token at so many streams."""
    spent = []
    for tokens in (1, options.tokens):
        load = Load(words=4, max_tokens=tokens)
        job = Job(target=target, load=load, clients=options.streams, first=0, end=options.streams)
        before = _cpu(pid)
        level = level_of(options.streams, workers.run(job, 1))
        spent.append(_cpu(pid) - before)
        assert not level.failed, level.failures
    count = options.streams * (options.tokens - 1)
    micros = (spent[1] - spent[0]) / count * 1e6
    setup = spent[0] / options.streams * 1e6
    print(
        f"{options.streams} streams: {micros:.1f} µs a token, {setup:.0f} µs a request of one; "
        f"{level.tokens_per_second:,.0f} tokens/s, the client {level.client_cpu:.0%} of a core",
        flush=True,
    )
    return micros


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """The measurement, or the stand-in engine that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the runner's pid, to point a profiler at")
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help="measure the HTTP server alone")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port is not None:
        asyncio.run(serve_bare(options.port, options.step_ms / 1000))
    elif options.bare:
        measure_bare(options)
    elif options.spec is not None:
        asyncio.run(serve(options.spec, options.socket))
    else:
        measure(options)


if __name__ == "__main__":
    main()
