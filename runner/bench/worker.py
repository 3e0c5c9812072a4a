"""A process of clients: `python -m runner.bench.worker`. Jobs come in on standard input, reports go out on standard
output, each as four bytes of length and MessagePack. SIGTERM ends the running job early, with what it has; so does the
end of standard input, since nobody is left to ask for it then.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from contextlib import suppress
from typing import IO

import msgspec

from runner.bench.clients import Clients
from runner.bench.job import Job, Report


def write_frame(stream: IO[bytes], message: msgspec.Struct) -> None:
    """Write one message. Raises BrokenPipeError."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message, None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    data = stream.read(size)
    return data if len(data) == size else None


async def _run(job: Job) -> Report:
    clients = Clients(job)
    loop, jobs = asyncio.get_running_loop(), sys.stdin.buffer

    def look() -> None:
        loop.remove_reader(jobs)
        if not jobs.peek(1):  # type: ignore[union-attr]  # a BufferedReader
            clients.stop()

    loop.add_signal_handler(signal.SIGTERM, clients.stop)
    with suppress(PermissionError):  # a file, whose end means nothing
        loop.add_reader(jobs, look)
    try:
        return await clients.run()
    finally:
        loop.remove_reader(jobs)


def main() -> None:
    """Serve jobs until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    gc.disable()  # a collection in the middle of a level would show as a slow token; the process is short-lived
    while data := read_frame(sys.stdin.buffer):
        job = msgspec.msgpack.decode(data, type=Job)
        try:
            report = asyncio.run(_run(job))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            write_frame(sys.stdout.buffer, report)
        except BrokenPipeError:
            # Python writes what is left when it ends, and would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return


if __name__ == "__main__":
    main()
