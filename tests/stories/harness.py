"""Runs mlx-run as a user does: the command in a process of its own, a manifest in a folder, clients over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.control.scene import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "examples" / "models"
DEADLINE = 60.0
"""Seconds after which something that should have happened has not. Far beyond what it takes, for busy machines."""


def until(what: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """The first true value of `what`, looked at every 10 ms. Fails after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(0.01)


class Bench:
    """A folder with a manifest, a state folder of its own, and the commands that work on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "dev.yaml"
        self.port = free_port()
        self.environment = {**os.environ, "MLX_RUN_STATE_DIR": str(folder / "state"), "MLX_RUN_ORPHAN_GRACE": "1"}
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE)
        for name in ("pirate", "shout"):
            shutil.copytree(MODELS / "adapters" / name, folder / "adapters" / name)

    @property
    def url(self) -> str:
        """Where the manifest's server listens."""
        return f"http://127.0.0.1:{self.port}"

    def write(self, adapters: dict[str, str] | None = None, extra: str = "", model_extra: str = "") -> None:
        """Write the manifest: demo-chat on this bench's port, with these adapters, and whatever is added."""
        chosen = {"pirate": "./adapters/pirate", "shout": "./adapters/shout"} if adapters is None else adapters
        lines = [
            "name: dev",
            "servers:",
            f"  lm: {{port: {self.port}}}",
            "models:",
            "  demo-chat:",
            f"    source: {MODELS / 'demo-chat'}",
        ]
        if chosen:
            lines.append("    adapters:")
            lines += [f"      {name}: {path}" for name, path in chosen.items()]
        self.save("\n".join(lines) + "\n" + model_extra + extra)

    def save(self, text: str) -> None:
        """Replace the manifest as an editor does: write beside it, then rename."""
        beside = self.manifest.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.manifest)

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "runner.cli.main", *arguments],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=DEADLINE, **options,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `mlx-run apply` in the foreground."""
        return subprocess.Popen(
            [sys.executable, "-m", "runner.cli.main", "apply", str(self.manifest), *arguments],
            env=self.environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        """A runner in the foreground that is ready; ends it, and checks that nothing of it is left."""
        process = self.start()
        try:
            until(lambda: self.ready() or process.poll() is not None)
            assert process.poll() is None, process.communicate()[0]
            yield process
        finally:
            left = descendants(process.pid)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            until(lambda: not any(alive(pid) for pid in left))

    def ready(self) -> bool:
        """Whether each model has generated."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def status(self) -> dict[str, Any]:
        """`mlx-run status --json`."""
        answer: dict[str, Any] = json.loads(self.run("status", "dev", "--json").stdout)
        return answer

    def model(self) -> dict[str, Any]:
        """The status of demo-chat."""
        (found,) = (m for m in self.status()["models"] if m["name"] == "demo-chat")
        model: dict[str, Any] = found
        return model

    def client(self) -> OpenAI:
        """The official client, which tries nothing twice here: a failed request must show."""
        return self._client

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def ask(self, text: str, adapter: str | None = None, **options: Any) -> str:
        """One greedy answer."""
        body = {"adapter_name": adapter} if adapter else {}
        answer = self.client().chat.completions.create(
            model="demo-chat", messages=[{"role": "user", "content": text}], temperature=0, extra_body=body, **options
        )
        return answer.choices[0].message.content or ""

    def metric(self, name: str) -> float:
        """The sum of a metric's samples on `/metrics`."""
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        samples = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        assert samples, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
