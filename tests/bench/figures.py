"""The spine's figures, as medians: start-up, first token, commands, idle memory, edit to answer, HTTP beside the loop.

    python tests/bench/figures.py [--repeat 11]

Runs real processes on the demo models, on ports of 127.0.0.1 that are free. Nothing else should run meanwhile: all of
it shares the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.commands import command_times, write_large  # noqa: E402
from tests.bench.plan_large import measure  # noqa: E402
from tests.control.scene import free_port  # noqa: E402

MODELS = ROOT / "examples" / "models"
COUNT = {"messages": [{"role": "user", "content": "Count from 1 to 60."}], "temperature": 0}


def count(number: int) -> dict[str, Any]:
    """The `number`th request of a load: answers of 150 to 310 tokens, so that rows come and go one by one."""
    return {**COUNT, "messages": [{"role": "user", "content": f"Count from 1 to {40 + 7 * number % 41}."}]}


ROWS, REQUESTS = 16, 96
REST = 11.0
"""Seconds after which everything that rests when idle does."""


class Site:
    """A manifest with demo-chat on two ports, and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.manifest = folder / "bench.yaml"
        self.port, self.other_port = free_port(), free_port()
        self.environment = {**os.environ, "MLX_RUN_STATE_DIR": str(folder / "state")}
        self.write()

    def write(self, adapters: dict[str, Path] | None = None) -> None:
        """Replace the manifest, as an editor does."""
        lines = [
            "name: bench",
            "servers:",
            f"  one: {{port: {self.port}}}",
            f"  two: {{port: {self.other_port}}}",
            "models:",
            "  demo-chat:",
            f"    source: {MODELS / 'demo-chat'}",
            *(["    adapters:"] if adapters else []),
            *(f"      {name}: {path}" for name, path in (adapters or {}).items()),
        ]
        beside = self.manifest.with_suffix(".new")
        beside.write_text("\n".join(lines) + "\n")
        beside.replace(self.manifest)

    def start(self) -> subprocess.Popen[bytes]:
        """`mlx-run apply` in the foreground."""
        command = [str(Path(sys.executable).parent / "mlx-run"), "apply", str(self.manifest)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The same from the moment it is started to its end."""
        process = self.start()
        try:
            yield process
        finally:
            stop(process)

    def get(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body; status 0 while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def until(self, status: int, path: str, body: dict[str, Any] | None = None, every: float = 0.001) -> None:
        """Ask until that is the status."""
        while self.get(path, body)[0] != status:
            time.sleep(every)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Drain a runner and wait for it."""
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def start_up(site: Site, repeat: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the command's start to the first 200 on /health, and, in other runs, to the first token."""
    health, token = [], []
    for _ in range(repeat):
        began = time.perf_counter()
        with site.running():
            site.until(200, "/health")
            health.append((time.perf_counter() - began) * 1e3)
            site.until(200, "/ready")
        began = time.perf_counter()
        with site.running():
            site.until(200, "/v1/chat/completions", {**COUNT, "max_tokens": 1})
            token.append((time.perf_counter() - began) * 1e3)
    return health, token


def adoption(site: Site, repeat: int) -> list[float]:
    """Milliseconds from starting a runner again after kill -9 to the first answer of the engine that it finds."""
    times = []
    process = site.start()
    site.until(200, "/ready")
    for _ in range(repeat):
        process.kill()
        process.wait()
        began = time.perf_counter()
        process = site.start()
        site.until(200, "/v1/chat/completions", {**COUNT, "max_tokens": 1})
        times.append((time.perf_counter() - began) * 1e3)
    stop(process)
    return times


def commands(site: Site, repeat: int) -> dict[str, list[float]]:
    """Milliseconds of `validate` on configs/dev.yaml and on 1,000 models, and of `status` while a runner is up."""
    validate = command_times(["validate", str(ROOT / "configs" / "dev.yaml")], site.environment, repeat)
    with tempfile.TemporaryDirectory() as folder:
        large = write_large(Path(folder), 1000)
        many = command_times(["validate", "--strict", "--for", "memory=4TiB", str(large)], site.environment, repeat)
    with site.running():
        site.until(200, "/ready")
        status = command_times(["status", "bench"], site.environment, repeat)
    return {"validate": validate, "validate_large": many, "status": status}


def idle(site: Site) -> tuple[float, float]:
    """MB of resident memory, and milliseconds of CPU a second, of a runner that has nothing to do."""
    with site.running() as process:
        site.until(200, "/ready")
        time.sleep(REST)
        before = _cpu_ticks(process.pid)
        time.sleep(5)
        ticks = _cpu_ticks(process.pid) - before
        (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        return int(resident) / 1024, ticks / os.sysconf("SC_CLK_TCK") / 5 * 1e3


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def edits(site: Site, repeat: int, pause: float) -> list[float]:
    """Milliseconds from saving a manifest with a new adapter to that adapter's first answer, `pause` seconds apart."""
    times = []
    with site.running():
        site.until(200, "/ready")
        for number in range(repeat):
            time.sleep(pause)
            name = f"new-{number}"
            began = time.perf_counter()
            site.write({name: MODELS / "adapters" / ("pirate", "shout")[number % 2]})
            site.until(200, "/v1/chat/completions", {**COUNT, "max_tokens": 1, "adapter_name": name}, every=0.01)
            times.append((time.perf_counter() - began) * 1e3)
            site.write()
            site.until(404, "/v1/chat/completions", {**COUNT, "max_tokens": 1, "adapter_name": name}, every=0.01)
    return times


def over_http(site: Site) -> float:
    """Tokens a second that ROWS streaming clients get."""
    with site.running():
        site.until(200, "/ready")
        asyncio.run(_clients(site.port, ROWS))  # warm
        began = time.perf_counter()
        tokens = asyncio.run(_clients(site.port, REQUESTS))
        return tokens / (time.perf_counter() - began)


async def _clients(port: int, requests: int) -> int:
    left = iter(range(requests))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
    )

    async def client() -> int:
        tokens = 0
        for number in left:
            body = json.dumps({**count(number), "stream": True, "stream_options": {"include_usage": True}})
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            tail = b""
            while data := await reader.read(65536):
                tail = (tail + data)[-2000:]
            assert b"[DONE]" in tail, tail
            (counted,) = re.findall(rb'"completion_tokens":(\d+)', tail)
            tokens += int(counted)
            writer.close()
        return tokens

    return sum(await asyncio.gather(*(client() for _ in range(ROWS))))


def loop_alone() -> float:
    """Tokens a second of the engine's loop on the same requests, in a process without socket and runner."""
    output = subprocess.run([sys.executable, __file__, "--loop"], capture_output=True, text=True, check=True).stdout
    return float(output)


def run_loop() -> None:
    """The process behind `loop_alone`."""
    from runner.engine import environment, upstream  # noqa: F401

    environment.restart_if_needed(time.monotonic())
    from runner.engine.limits import Limits
    from runner.engine.loader import load
    from runner.engine.loop import Engine
    from runner.protocol import FromEngine, Generate, Step

    produced = ended = 0

    def emit(frame: FromEngine) -> None:
        nonlocal produced, ended
        if isinstance(frame, Step):
            produced += sum(delta.tokens for delta in frame.deltas)
            ended += sum(delta.finish_reason is not None for delta in frame.deltas)

    engine = Engine(load(MODELS / "demo-chat"), Limits(max_rows=32, prefix_cache_bytes=256 * 2**20), emit)

    def drive(requests: int) -> None:
        nonlocal ended
        submitted = ended = 0
        while ended < requests:
            while submitted < requests and submitted - ended < ROWS:
                engine.submit(Generate(id=submitted, messages=count(submitted)["messages"]))
                submitted += 1
            engine.step()

    drive(ROWS)
    produced = 0
    began = time.perf_counter()
    drive(REQUESTS)
    print(produced / (time.perf_counter() - began))


def main() -> None:
    """Measure all, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        run_loop()
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "granian", "falcon", "pydantic"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}; {packages}")
    with tempfile.TemporaryDirectory() as folder:
        report(Site(Path(folder)), arguments.repeat)


def report(site: Site, repeat: int) -> None:
    """Every figure with its bound."""
    health, token = start_up(site, repeat)
    line("/health after apply starts", "ms", health, 250)
    line("first token after apply starts", "ms", token, 1500)
    line("first answer of an adopted engine", "ms", adoption(site, repeat), 500)
    took = commands(site, repeat)
    line("validate configs/dev.yaml", "ms", took["validate"], 300)
    line("validate, 1,000 models in folders of their own", "ms", took["validate_large"], 1500)
    line("plan in process, 1,000 models, slowest edit", "ms", slowest_plan(repeat), 100)
    line("status", "ms", took["status"], 60)
    memory, cpu = idle(site)
    line("idle runner, two ports, resident", "MB", [memory], 50)
    line("idle runner, CPU a second", "ms", [cpu], None)
    line("save → new adapter answers, after a pause", "ms", edits(site, repeat, REST), 300)
    line("save → new adapter answers, edit after edit", "ms", edits(site, repeat, 0.2), 300)
    pairs = [(over_http(site), loop_alone()) for _ in range(max(repeat // 2, 3))]
    line(f"tokens/s over HTTP, {ROWS} rows", "", [one for one, _ in pairs], None)
    line(f"tokens/s of the loop alone, {ROWS} rows", "", [other for _, other in pairs], None)
    line("HTTP / loop", "%", [100 * one / other for one, other in pairs], 90, better=max)


def slowest_plan(repeat: int) -> list[float]:
    """CPU milliseconds of the plan that takes longest of those of `plan_large`."""
    found = measure(1000, rounds=repeat)
    return max((row["all_ms"] for row in found.values()), key=statistics.median)


def line(what: str, unit: str, values: list[float], bound: float | None, better: Callable[..., float] = min) -> None:
    """Median, range and bound of one figure."""
    median = statistics.median(values)
    wanted = "" if bound is None else f"  {'≤' if better is min else '≥'} {bound:g}"
    met = "" if bound is None else ("  met" if better(median, bound) == median else "  MISSED")
    spread = f"({min(values):.0f} to {max(values):.0f}, n={len(values)})" if len(values) > 1 else ""
    print(f"{what:<44} {median:8.1f} {unit:<3} {spread:<26}{wanted}{met}", flush=True)


if __name__ == "__main__":
    main()
