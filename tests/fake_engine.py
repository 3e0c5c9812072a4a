"""An engine without MLX: the real protocol over a real socket in a real process, answers made from the request.

It stands in where only the control plane is tested. `{"fake": {...}}` in the model folder's config.json scripts it:
`load_seconds`, `waits_for` (a file: it is not loaded before that is there), `refuse` (a reason: the model cannot be
loaded, after `load_seconds`), `die_loading` (it kills itself then), `lives` (seconds from loaded to killing itself),
`die_after` (tokens, then it kills itself), `abort_after` (the same by an abort, with `last_words`), `overrun_after`
(the same, for too much memory), `tokens` (the most of an answer, which ends by itself), `eats_after` (tokens, then it
takes `eats_mib` of memory). A chat's answer is `ADAPTER-KEY:TEXT` repeated over `max_tokens` tokens, one every
`token_seconds`; more of them than its `max_context` are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import msgspec

from runner.engine.oom import enter
from runner.protocol import (
    VERSION,
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    Cancel,
    Configure,
    Delta,
    DropAdapter,
    EngineSpec,
    FromEngine,
    Generate,
    Hello,
    LoadAdapter,
    Loaded,
    LoadFailed,
    Overrun,
    Rejected,
    Shutdown,
    Stats,
    Step,
    ToEngine,
    Usage,
    decoder_to_engine,
    encode_frame,
)


class FakeEngine:
    def __init__(self, spec: EngineSpec, script: dict[str, object]) -> None:
        self.spec = spec
        self.script = script
        self.adapters = {a.key for a in spec.adapters}
        self.rows: dict[int, asyncio.Task[None]] = {}
        self.writer: asyncio.StreamWriter | None = None
        self.loaded = asyncio.Event()
        self.tokens = 0
        self.eaten = b""
        self.budget = spec.budget_bytes
        self.max_context = spec.max_context
        self.cancelled = 0
        self.connected = asyncio.Event()
        self.gone = asyncio.Event()

    def send(self, message: FromEngine) -> None:
        if self.writer is not None:
            self.writer.write(encode_frame(message))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.gone.clear()
        self.connected.set()
        self.send(
            Hello(VERSION, os.getpid(), self.spec.model, self.spec.digest, self.loaded.is_set(), [*self.adapters])
        )
        loading = asyncio.create_task(self.load())
        decoder = decoder_to_engine()
        while data := await reader.read(65536):
            for message in decoder.feed(data):
                self.handle(message)
        loading.cancel()
        for row in self.rows.values():
            row.cancel()
        self.rows.clear()
        self.connected.clear()
        self.gone.set()

    async def load(self) -> None:
        if not self.loaded.is_set():
            await asyncio.sleep(float(str(self.script.get("load_seconds", 0.0))))
            while (file := self.script.get("waits_for")) and not Path(str(file)).exists():
                await asyncio.sleep(0.01)
            if reason := self.script.get("refuse"):
                self.send(LoadFailed(str(reason)))
                os._exit(1)
            if self.script.get("die_loading"):
                os.kill(os.getpid(), signal.SIGKILL)
            if lives := self.script.get("lives"):
                asyncio.get_running_loop().call_later(float(str(lives)), os.kill, os.getpid(), signal.SIGKILL)
            self.loaded.set()
        self.send(Loaded(weights_bytes=1000, active_bytes=1000, seconds=0.0, max_context=1024, device="fake"))

    def handle(self, message: ToEngine) -> None:
        match message:
            case Generate():
                self.rows[message.id] = asyncio.create_task(self.answer(message))
            case Cancel(id=row_id):
                row = self.rows.pop(row_id, None)
                if row is not None:
                    row.cancel()
                    self.cancelled += 1
                    self.stats()
            case LoadAdapter(adapter=adapter):
                if (Path(adapter.path) / "refuse").exists():
                    self.send(AdapterRefused(adapter.key, "this adapter applies to no layer"))
                else:
                    self.adapters.add(adapter.key)
                    self.send(AdapterLoaded(adapter.key, 1, 10, 8))
            case DropAdapter(key=key):
                self.adapters.discard(key)
                self.send(AdapterDropped(key))
            case Shutdown():
                os._exit(0)
            case Configure(memory_limit_bytes=limit, max_context=longest):
                self.budget = self.budget if limit is None else limit
                self.max_context = self.max_context if longest is None else longest
                self.stats()

    async def answer(self, request: Generate) -> None:
        if request.adapter and request.adapter not in self.adapters:
            self.send(Rejected(request.id, 404, "no such adapter", "adapter_name"))
            return
        count, reason = request.max_tokens or 4, "length"
        if self.max_context and count > self.max_context:
            self.send(Rejected(request.id, 400, f"at most {self.max_context} tokens", "max_tokens"))
            return
        if (most := self.script.get("tokens")) is not None and int(str(most)) < count:
            count, reason = int(str(most)), "stop"
        for index in range(count):
            self.tokens += 1
            if self.tokens == self.script.get("die_after"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.tokens == self.script.get("abort_after"):
                sys.stderr.write(str(self.script["last_words"]))
                sys.stderr.flush()
                os.abort()
            if self.tokens == self.script.get("eats_after"):
                self.eaten = b"x" * (int(str(self.script["eats_mib"])) * 2**20)
            if self.tokens == self.script.get("overrun_after"):
                self.send(Overrun(200, 100))
                assert self.writer is not None
                await self.writer.drain()
                os._exit(3)
            last = index == count - 1
            usage = Usage(1, count) if last else None
            text = f"{request.adapter or 'base'} "
            self.send(Step([Delta(request.id, text, 1, reason if last else None, usage)]))
            await asyncio.sleep(float(str(self.script.get("token_seconds", 0.0))))
        self.rows.pop(request.id, None)
        self.stats()

    def stats(self) -> None:
        self.send(
            Stats(
                rows=len(self.rows),
                prefilling=0,
                waiting=0,
                adapters=sorted(self.adapters),
                active_bytes=1000,
                peak_bytes=1000,
                cache_bytes=0,
                prefix_cache_bytes=0,
                prompt_tokens_total=0,
                cached_tokens_total=0,
                completion_tokens_total=self.tokens,
                steps_total=0,
                cancelled_total=self.cancelled,
                failed_total=0,
                budget_bytes=self.budget,
            )
        )


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    arguments = parser.parse_args()
    spec = msgspec.json.decode(arguments.spec.read_bytes(), type=EngineSpec)
    script = json.loads((Path(spec.path) / "config.json").read_text()).get("fake", {})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    enter(spec.control_group)
    engine = FakeEngine(spec, script)
    await asyncio.start_unix_server(engine.serve, str(arguments.socket))
    while True:
        await engine.gone.wait()
        try:
            await asyncio.wait_for(engine.connected.wait(), spec.orphan_grace)
        except TimeoutError:
            return


if __name__ == "__main__":
    asyncio.run(main())
