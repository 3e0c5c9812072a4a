"""What a streamed token costs the load generator: CPU of its processes from the socket to the figures.

    python tests/bench/client_cost.py [--streams 128] [--tokens 400] [--step-ms 5] [--processes 1] [--repeat 3]

A server of its own process (this file again, with --port) writes an event of the gateway's length to every stream each
step, one write a stream, as the gateway does, at a steady pace. What a request costs beside its tokens is measured with
answers of one token and taken off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.bench.figures import level_of  # noqa: E402
from runner.bench.job import Job, Load, Report, Target  # noqa: E402
from runner.bench.workers import Workers  # noqa: E402
from tests.bench.servers import environment, free_port, process, wait_until  # noqa: E402

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(choice: dict[str, object], **more: object) -> bytes:
    start = {"id": "chatcmpl-" + 24 * "f", "object": "chat.completion.chunk", "created": 1764068429, "model": "chat"}
    body = {**start, "system_fingerprint": "fp_" + 16 * "f", "usage": None, "choices": [choice], **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


_SAME = {"index": 0, "logprobs": None}
TOKEN = _chunk(_event({**_SAME, "delta": {"content": " token"}, "finish_reason": None}))


def _end(tokens: int) -> bytes:
    usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": tokens + 20}
    last = _event({**_SAME, "delta": {}, "finish_reason": "length"})
    return _chunk(last + _event({}, choices=[], usage=usage) + b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Stream(asyncio.Protocol):
    """A connection, and how many tokens its answer still has. Requests come whole, or in two pieces."""

    def __init__(self, running: set[Stream]) -> None:
        self._running = running
        self._request = b""
        self._left = self._tokens = 0
        self._begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._running.discard(self)

    def data_received(self, data: bytes) -> None:
        self._request += data
        head, end, body = self._request.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not end or len(body) < int(length or 0):
            return
        self._request = b""
        if not body:
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        self._left = self._tokens = json.loads(body)["max_tokens"]
        self._begun = False
        self._running.add(self)

    def step(self) -> None:
        """One token more."""
        self._left -= 1
        self._transport.write(TOKEN if self._begun else HEAD + TOKEN)
        self._begun = True
        if not self._left:
            self._running.discard(self)
            self._transport.write(_end(self._tokens))


async def serve(port: int, seconds: float) -> None:
    """Steps for ever, each at its time: one that comes late is followed by the next sooner."""
    loop = asyncio.get_running_loop()
    running: set[Stream] = set()
    server = await loop.create_server(lambda: Stream(running), "127.0.0.1", port)
    async with server:
        due = loop.time()
        while True:
            due = max(due + seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            for stream in list(running):
                stream.step()


def cost(workers: Workers, target: Target, options: argparse.Namespace) -> float:
    """Microseconds of the load generator's CPU a token at so many streams."""
    spent = []
    for tokens in (1, options.tokens):
        load = Load(words=190, max_tokens=tokens)
        job = Job(target=target, load=load, clients=options.streams, first=0, end=options.streams)
        reports: list[Report] = workers.run(job, options.processes)
        level = level_of(options.streams, reports)
        assert not level.failed, level.failures
        assert level.tokens == options.streams * tokens, level.tokens
        assert all(outcome.chunks == tokens for report in reports for outcome in report.outcomes)
        spent.append(sum(report.cpu_seconds for report in reports))
    micros = (spent[1] - spent[0]) / (options.streams * (options.tokens - 1)) * 1e6
    print(
        f"{options.streams} streams: {micros:.1f} µs a token, {spent[0] / options.streams * 1e6:.0f} µs a request of "
        f"one; {level.tokens_per_second:,.0f} tokens/s, a process {level.client_cpu:.0%} of a core",
        flush=True,
    )
    return micros


def measure(options: argparse.Namespace) -> None:
    """Start, load, print."""
    with tempfile.TemporaryDirectory() as scratch, Workers(options.processes) as workers:
        target, log = Target(host="127.0.0.1", port=free_port()), Path(scratch, "log")
        command = [sys.executable, __file__, "--port", str(target.port), "--step-ms", str(options.step_ms)]
        with process(command, log, environment()) as server:
            wait_until(target, "/", 200, server, log)
            costs = [cost(workers, target, options) for _ in range(options.repeat)]
    print(f"median {statistics.median(costs):.1f}, least {min(costs):.1f} µs a token")


def main() -> None:
    """The measurement, or the server that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port is not None:
        asyncio.run(serve(options.port, options.step_ms / 1000))
    else:
        measure(options)


if __name__ == "__main__":
    main()
