"""The servers that are compared, as processes: ours, mlx_lm.server, mlx_vlm.server, and the engine's loop alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from runner.bench.job import Target
from runner.environment import cpu_environment

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
"""How long a server may take to answer for the first time: a GPU's kernels are compiled meanwhile."""

PEER_PATIENCE = 5.0
"""Seconds that a peer has to end in: one that no longer answers does not end by itself either."""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(
    command: list[str], log: Path, environment: Mapping[str, str], patience: float = 20.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end, and made to after `patience` seconds. Its output is added to `log`."""
    with log.open("ab") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(patience)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def environment(**more: str) -> dict[str, str]:
    """On the CPU ours for all: the same BLAS and the same number of its threads. On CUDA each sets up its own, but that
    MLX's check, which ends a server of many shapes some day, is off for all."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    unchecked = {"MLX_ENABLE_CACHE_THRASHING_CHECK": "0"}
    own = {**unchecked, **os.environ, **cpu_environment(os.environ)}
    return {**own, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def wait_until(target: Target, path: str, status: int, started: subprocess.Popen[bytes], log: Path) -> None:
    """Until a GET has that status. Raises SystemExit with the log's end when the process ends, or it takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and started.poll() is None:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == status:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    sys.exit(f"{' '.join(map(str, started.args))} did not come up:\n{log.read_text(errors='replace')[-4000:]}")


@contextmanager
def ours(folder: Path, model: Path, adapters: Mapping[str, Path], *, port: int, max_rows: int) -> Iterator[Target]:
    """`mlx-run apply` of a manifest with this model."""
    manifest = folder / "ours.yaml"
    lines = [
        "name: ours",
        f"servers: {{lm: {{port: {port}}}}}",
        "models:",
        "  bench:",
        f"    source: {model}",
        f"    batching: {{max_rows: {max_rows}}}",
        "    kv_cache: {max_context: 4096}",
        *(["    adapters:"] if adapters else []),
        *(f"      {name}: {path}" for name, path in adapters.items()),
    ]
    manifest.write_text("\n".join(lines) + "\n")
    target, log = Target(host="127.0.0.1", port=port, model="bench"), folder / "ours.log"
    command = [sys.executable, "-P", "-m", "runner.cli.main", "apply", str(manifest)]
    with process(command, log, environment(MLX_RUN_STATE_DIR=str(folder / "state"))) as started:
        wait_until(target, "/ready", 200, started, log)
        yield target


@contextmanager
def mlx_lm_server(folder: Path, model: Path, *, port: int, arguments: list[str]) -> Iterator[Target]:
    """mlx_lm.server. It is asked for its model by path: under its default name it would ignore adapters."""
    target, log = Target(host="127.0.0.1", port=port, model=str(model)), folder / "mlx_lm.log"
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
    with process([*command, "--log-level", "ERROR", *arguments], log, environment(), PEER_PATIENCE) as started:
        wait_until(target, "/health", 200, started, log)
        yield target


@contextmanager
def mlx_vlm_server(folder: Path, model: Path, *, port: int, arguments: list[str]) -> Iterator[Target]:
    """mlx_vlm.server."""
    target, log = Target(host="127.0.0.1", port=port, model=str(model)), folder / "mlx_vlm.log"
    command = [sys.executable, "-m", "mlx_vlm.server", "--model", str(model), "--host", "127.0.0.1"]
    with process([*command, "--port", str(port), *arguments], log, environment(), PEER_PATIENCE) as started:
        wait_until(target, "/health", 200, started, log)
        yield target


PEERS = {"mlx_lm": mlx_lm_server, "mlx_vlm": mlx_vlm_server}


class Peer:
    """The peer's server: one that was given more than it finishes is replaced by a new one."""

    def __init__(self, kind: str, folder: Path, model: Path, arguments: list[str]) -> None:
        self._server = partial(PEERS[kind], folder, model, port=free_port(), arguments=arguments)
        self._stack = ExitStack()

    def __enter__(self) -> Target:
        return self._stack.enter_context(self._server())

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def replace(self) -> None:
        """End it, whatever it does, and start another at the same place."""
        self._stack.close()
        self._stack.enter_context(self._server())


class EngineLoop:
    """`tests/bench/engine_loop.py`: the engine's loop in a process, without socket and HTTP."""

    def __init__(self, model: Path, max_rows: int) -> None:
        command = [sys.executable, str(ROOT / "tests" / "bench" / "engine_loop.py"), str(model), str(max_rows)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
        )

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, **question: object) -> dict[str, float]:
        """One measurement; see the script for what it takes and gives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the engine's loop ended; its output says why")
        answer: dict[str, float] = json.loads(line)
        return answer
