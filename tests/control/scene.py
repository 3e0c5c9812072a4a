"""A manifest with engines that need no MLX (`tests/fake_engine.py`), for tests of the control plane alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from runner.control.compiler import Compiler
from runner.control.runner import Runner
from runner.gateway.sockets import is_free
from runner.options import Options

FAKE_ENGINE = Path(__file__).resolve().parents[1] / "fake_engine.py"


GEOMETRY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 256,
}
"""A model that nothing is said about."""


_PORTS = range(10_000, 32_000)
"""Below those that a system gives to whoever asks for any, such as a client's end of a connection."""

_SHARES = 20


@cache
def _own_ports() -> Iterator[int]:
    """Those that no other worker of pytest-xdist's takes, in turn, from any on: other runs of pytest take them too."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = _PORTS[worker % _SHARES :: _SHARES]
    first = random.SystemRandom().randrange(len(own))  # hypothesis seeds the common one
    return islice(cycle(own), first, None)


def free_port() -> int:
    """A port nobody listens on now, and that nobody else is given before it is used."""
    return next(port for port in _own_ports() if is_free("127.0.0.1", port))


def write_safetensors(path: Path, tensors: dict[str, list[int]]) -> None:
    """A well-formed file of float32 zeros."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + offset)  # large ones take no room


class Scene:
    """A folder with fake models and adapters, and a runner over it in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "dev.yaml"
        self.events: list[dict[str, Any]] = []
        self.happened = asyncio.Condition()
        self.runner: Runner | None = None
        self.running: asyncio.Task[Any] | None = None
        self.lm = f"lm: {{port: {free_port()}}}"

    def model(self, name: str, mib: int = 0, geometry: dict[str, Any] | None = None, **script: object) -> None:
        """A model folder whose engine behaves as scripted, and whose weights take so much memory by their header;
        `geometry` is what its configuration says otherwise."""
        folder = self.folder / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**GEOMETRY, **(geometry or {}), "fake": script}))
        layer = {"model.layers.0.self_attn.q_proj.weight": [4, 4]}
        write_safetensors(folder / "model.safetensors", {"w": [max(mib * 2**18, 16)], **layer})

    def adapter(self, name: str, version: int = 1, *, refused: bool = False) -> None:
        """An adapter folder; another version is other content."""
        folder = self.folder / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 8, "scale": version}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        layer = "model.layers.0.self_attn.q_proj"
        write_safetensors(folder / "adapters.safetensors", {f"{layer}.lora_a": [4, 8], f"{layer}.lora_b": [8, 4]})
        if refused:
            (folder / "refuse").touch()

    def write(self, models: str, servers: str = "", top: str = "") -> None:
        """The manifest: `models` and `servers` (beside `lm`) are flow or block YAML, indented here."""
        text = f"name: dev\n{top}\nservers:\n  {self.lm}\n{_indent(servers)}\nmodels:\n{_indent(models)}\n"
        beside = self.manifest.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.manifest)

    def start(self, *, watch: bool = True, **options: Any) -> asyncio.Task[Any]:
        """The runner, running, with these options in place of the tests' own."""
        command = shlex.join([sys.executable, str(FAKE_ENGINE)])
        chosen = {"orphan_grace": 0.5, "drain_timeout": 5, "engine_command": command, **options}
        compiler = Compiler()
        made = Options(state_dir=self.folder / "state", cache_dir=self.folder / "cache", **chosen)
        self.runner = Runner(compiler.compile([self.manifest]), made, compiler, self._record, watch=watch)
        self.running = asyncio.create_task(self.runner.run())
        return self.running

    async def end(self) -> None:
        """Stop the runner, if there is one; its handlers of signals go with it. Raises TimeoutError."""
        if self.runner is not None and self.running is not None:
            self.runner._stop.set()
            async with asyncio.timeout(20):
                await self.running
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _record(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        task = asyncio.ensure_future(self._notify())
        task.add_done_callback(lambda t: t.exception())

    async def _notify(self) -> None:
        async with self.happened:
            self.happened.notify_all()

    async def until(self, what: Callable[[], Any]) -> Any:
        """The first true value of `what`, looked at after every event."""
        async with asyncio.timeout(15), self.happened:
            await self.happened.wait_for(lambda: bool(what()))
        return what()

    async def event(self, name: str, count: int = 1) -> dict[str, Any]:
        """The `count`th event of that name."""
        found = await self.until(lambda: [e for e in self.events if e["event"] == name][count - 1 : count])
        event: dict[str, Any] = found[0]
        return event

    @property
    def live(self) -> Any:
        """The runner's live state."""
        assert self.runner is not None
        return self.runner._live

    def port(self, name: str = "lm") -> int:
        """The port a listener got."""
        port: int = self.live.listeners[name].address[1]
        return port


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.strip("\n").splitlines())
