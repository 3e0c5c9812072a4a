"""A runner as its users have it, for the model-based test: real processes, a manifest with an overlay, fake engines.

`Declared` is what a manifest says, as plain values; `World.expected` is what the status has to come to for it, and
`World.observed` what it came to.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from runner.control import client
from runner.control.generations import Generation, Generations
from runner.control.state_folder import StateFolder
from runner.errors import NotRunning
from runner.plan.digests import DigestCache, adapter_digest, model_digest
from tests.control.scene import FAKE_ENGINE, Scene, free_port

DEADLINE = 45.0
"""Seconds after which something that should have happened has not; far beyond what it takes."""

SOURCES = ("m0", "m1", "m2")
ADAPTERS = ("a0", "a1")
TOKENS = 12
TOKEN_SECONDS = 0.02


@dataclass(frozen=True)
class Model:
    """One `models` entry."""

    source: str
    adapters: tuple[str, ...] = ()
    alias: str = ""


@dataclass(frozen=True)
class Declared:
    """A manifest with its overlay. `lm` and `more` are ports, `more` 0 for none; `over` is the overlay's alias for the
    first model."""

    models: tuple[tuple[str, Model], ...]
    lm: int
    more: int = 0
    over: str = ""

    def base(self) -> str:
        """The manifest's text."""
        lines = ["name: dev", "servers:", f"  lm: {{port: {self.lm}}}"]
        if self.more:
            lines.append(f"  more: {{port: {self.more}, models: [{self.models[0][0]}]}}")
        lines.append("models:")
        for name, model in self.models:
            adapters = ", ".join(f"{adapter}: ./adapters/{adapter}" for adapter in model.adapters)
            aliases = f"[{model.alias}]" if model.alias else "[]"
            lines.append(f"  {name}: {{source: ./models/{model.source}, aliases: {aliases}, adapters: {{{adapters}}}}}")
        return "\n".join(lines) + "\n"

    def overlay(self) -> str:
        """The overlay's text."""
        first = self.models[0][0]
        return f"models: {{{first}: {{aliases: [{self.over}]}}}}\n" if self.over else "x-nothing: true\n"

    def text(self) -> str:
        """Both, as `World.text` reads them."""
        return self.base() + self.overlay()


@dataclass
class Asked:
    """A streamed request that has its first token from the process `engine`. `doomed`: something that it needs was
    killed."""

    engine: int
    doomed: bool = False
    error: str = ""
    tokens: int = 0
    thread: threading.Thread = field(default_factory=threading.Thread)


class World:
    """One state folder, and at most one runner over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = StateFolder(folder / "state", "dev")
        self.generations = Generations(self.state.generations, self._damaged)
        self.damaged: list[str] = []
        self.asked: list[Asked] = []
        self.runner: subprocess.Popen[bytes] | None = None
        self.ports = [free_port() for _ in range(3)]
        self._scene = Scene.__new__(Scene)
        self._scene.folder = folder
        self._versions: dict[str, int] = {}
        self._seen: dict[int, float] = {}
        for source in SOURCES:
            self.change_model(source)
        for adapter in ADAPTERS:
            self.change_adapter(adapter)

    def _damaged(self, path: Path, reason: str) -> None:
        self.damaged.append(f"{path.name}: {reason}")

    # ------------------------------------------------------------- files

    def write(self, declared: Declared) -> None:
        """Save manifest and overlay, each as editors do."""
        for name, text in (("dev.yaml", declared.base()), ("over.yaml", declared.overlay())):
            if not (self.folder / name).exists() or (self.folder / name).read_text() != text:
                self.save(name, text)

    def text(self) -> str:
        """What manifest and overlay say now."""
        return "".join((self.folder / name).read_text() for name in ("dev.yaml", "over.yaml"))

    def save(self, name: str, text: str) -> None:
        """Write beside, then rename."""
        beside = self.folder / f".{name}.new"
        beside.write_text(text)
        beside.replace(self.folder / name)

    def change_model(self, source: str) -> None:
        """Other content in a model's folder."""
        load = 0.2 if source == SOURCES[-1] else 0.0
        self._scene.model(source, token_seconds=TOKEN_SECONDS, load_seconds=load, version=self._next(source))

    def change_adapter(self, adapter: str) -> None:
        """Other content in an adapter's folder."""
        self._scene.adapter(adapter, version=self._next(adapter))

    def _next(self, name: str) -> int:
        self._versions[name] = self._versions.get(name, 0) + 1
        return self._versions[name]

    # ------------------------------------------------------------- the runner

    def start(self) -> None:
        """Start a runner; returns when its control socket answers."""
        environment = {
            **os.environ,
            "MLX_RUN_STATE_DIR": str(self.folder / "state"),
            "MLX_RUN_ENGINE_COMMAND": shlex.join([sys.executable, str(FAKE_ENGINE)]),
            "MLX_RUN_ORPHAN_GRACE": "20",
            "MLX_RUN_DRAIN_TIMEOUT": "10",
        }
        command = [sys.executable, "-m", "runner.cli.main", "-f", "dev.yaml", "-f", "over.yaml", "apply"]
        with (self.folder / "out").open("ab") as out:
            self.runner = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self.until(lambda: client.is_up(self.state.control_socket) or self._ended(), "the control socket answers")

    def _ended(self) -> bool:
        assert self.runner is not None
        assert self.runner.poll() is None, f"the runner ended:\n{(self.folder / 'out').read_text()[-3000:]}"
        return False

    def kill(self) -> None:
        """kill -9 the runner, and nothing else."""
        assert self.runner is not None
        self._note_processes()
        self.runner.kill()
        self.runner.wait()
        for asked in self.asked:
            asked.doomed = True

    def kill_engine(self, pid: int) -> None:
        """kill -9 an engine, unless it has ended since the runner was asked for its pid: by an edit, or by us."""
        for asked in self.asked:
            asked.doomed |= asked.engine == pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End everything; what is left of it after a while is an error."""
        try:
            if self.runner is not None and self.runner.poll() is None:
                self._note_processes()
                self.runner.send_signal(signal.SIGTERM)
                self.runner.wait(DEADLINE)
                self.until(lambda: not self.processes(), "every process has ended with the runner")
        finally:
            for process in self.processes():
                process.kill()

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the runner something."""
        return client.request(self.state.control_socket, op, timeout=DEADLINE, **fields)

    def status(self) -> dict[str, Any]:
        """`mlx-run status --json`."""
        return self.request("status")

    # ------------------------------------------------------------- what is, and what should be

    def expected(self, declared: Declared) -> dict[str, Any]:
        """What the status comes to once this is in effect, with the folders as they are now."""
        cache = DigestCache()
        models = {}
        for index, (name, model) in enumerate(declared.models):
            alias = declared.over if declared.over and index == 0 else model.alias
            models[name] = {
                "digest": model_digest(self.folder / "models" / model.source, cache).digest,
                "aliases": [alias] if alias else [],
                "adapters": {a: adapter_digest(self.folder / "adapters" / a, cache).digest for a in model.adapters},
            }
        names = [name for name, _ in declared.models]
        servers = {"lm": (declared.lm, names)}
        if declared.more:
            servers["more"] = (declared.more, names[:1])
        return {"models": models, "servers": servers}

    def observed(self, status: dict[str, Any]) -> dict[str, Any]:
        """The same of a status."""
        models = {
            m["name"]: {
                "digest": m["digest"],
                "aliases": m["aliases"],
                "adapters": {a["name"]: a["key"] for a in m["adapters"]},
            }
            for m in status["models"]
            if m["state"] == "ready"
        }
        servers = {s["name"]: (int(s["address"].rpartition(":")[2]), s["models"]) for s in status["servers"]}
        return {"models": models, "servers": servers}

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started here: engines by their command line, children of any runner by having been
        seen."""
        known = (_same(pid, born) for pid, born in self._seen.items())
        return [*self._engines(), *(process for process in known if process is not None)]

    def _note_processes(self) -> None:
        assert self.runner is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.runner.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._seen[child.pid] = child.create_time()

    def _engines(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if str(FAKE_ENGINE) in command and str(self.folder) in command and _alive(process):
                    yield process

    def engine_pids(self) -> set[int]:
        """Engines that are alive."""
        return {process.pid for process in self._engines()}

    def strays(self) -> list[int]:
        """Processes that an earlier runner left and nobody has taken over."""
        assert self.runner is not None
        children = {child.pid for child in psutil.Process(self.runner.pid).children(recursive=True)}
        left = {pid for pid, born in self._seen.items() if _same(pid, born) is not None}
        return sorted(left - children - self.engine_pids())

    def listening(self) -> set[int]:
        """Ports that the runner listens on."""
        assert self.runner is not None
        connections = psutil.Process(self.runner.pid).net_connections(kind="tcp")
        return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}

    def history(self) -> list[Generation]:
        """Every generation; none may be damaged."""
        found = self.generations.all()
        assert not self.damaged, self.damaged
        return found

    def until(self, what: Callable[[], Any], wish: str) -> Any:
        """The first true value of `what`, looked at every 20 ms."""
        end = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(NotRunning):
                if value := what():
                    return value
            assert time.monotonic() < end, f"not within {DEADLINE} s: {wish}"
            time.sleep(0.02)

    # ------------------------------------------------------------- requests

    def complete(self, port: int, model: str) -> tuple[int, str]:
        """Status and text of one short completion."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        try:
            _post(connection, {"model": model, "prompt": "x", "max_tokens": 1})
            response = connection.getresponse()
            body = json.loads(response.read())
            return response.status, body["choices"][0]["text"] if response.status == 200 else ""
        finally:
            connection.close()

    def ask(self, port: int, model: str, engine: int) -> None:
        """Begin a stream, and return once it has its first token; `finish` looks at how it ended."""
        asked = Asked(engine)
        begun = threading.Event()
        asked.thread = threading.Thread(target=_stream, args=(port, model, asked, begun), daemon=True)
        asked.thread.start()
        assert begun.wait(DEADLINE), "a stream has its first token"
        self.asked.append(asked)

    def finish(self) -> None:
        """Every stream has ended, and well, unless something was killed that it needed."""
        for asked in self.asked:
            asked.thread.join(DEADLINE)
            assert not asked.thread.is_alive(), "a stream ends"
            assert asked.doomed or (not asked.error and asked.tokens == TOKENS), asked
        self.asked.clear()


def _stream(port: int, model: str, asked: Asked, begun: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        usage = {"include_usage": True}  # pieces are no tokens: on a busy machine several come as one
        _post(
            connection, {"model": model, "prompt": "x", "max_tokens": TOKENS, "stream": True, "stream_options": usage}
        )
        response = connection.getresponse()
        if response.status != 200:
            asked.error = f"{response.status}: {response.read().decode()}"
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    asked.error = json.dumps(event["error"])
                elif event["usage"]:
                    asked.tokens = event["usage"]["completion_tokens"]
            begun.set()
    except (OSError, http.client.HTTPException) as error:
        asked.error = repr(error)
    finally:
        begun.set()
        connection.close()


def _post(connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})


def _same(pid: int, born: float) -> psutil.Process | None:
    """The process of that id, if it is the one that was born then and lives."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == born and _alive(process):
            return process
    return None


def _alive(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)
