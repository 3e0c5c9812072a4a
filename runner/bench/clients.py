"""The clients of one process: each sends its next request when its last has ended."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator

import msgspec

from runner.bench.answer import Answer
from runner.bench.http import Closed, Connection
from runner.bench.job import Job, Outcome, Report
from runner.bench.prompts import request_fields

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds that a client waits after a failure, doubled with each in a row: a server that is down is not hammered."""


class Clients:
    """All clients of a job, and what they have measured so far; `stop()` ends them where they are."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.outcomes: list[Outcome] = []
        self.gaps = array("d")
        self._numbers: Iterator[int] = iter(range(job.first, job.end, job.stride))
        self._deadline = float("inf")
        self._stopped = self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> Report:
        """Returns when the last request has ended, or the job's time is over."""
        cpu = time.process_time()
        if self._job.duration is not None:
            self._deadline = time.perf_counter() + self._job.duration
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._job.clients)]
        _, late = await asyncio.wait(self._tasks, timeout=self._job.limit)
        if late:
            self._over = True
            for task in late:
                task.cancel()
            await asyncio.wait(late)
        for task in self._tasks:
            if not task.cancelled():
                task.result()
        return Report(
            outcomes=self.outcomes,
            gaps=self.gaps.tobytes(),
            cpu_seconds=time.process_time() - cpu,
            stopped=self._stopped,
            left=sum(1 for _ in self._numbers) if self._over and self._job.duration is None else 0,
        )

    def stop(self) -> None:
        """Ends the running requests; they are reported with the error `interrupted`."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def _client(self) -> None:
        pause = 0.0
        connection: Connection | None = None
        try:
            for number in self._numbers:
                if pause:
                    await asyncio.sleep(pause)
                if time.perf_counter() >= self._deadline:
                    return
                outcome = Outcome(index=number, began=0.0)
                self.outcomes.append(outcome)
                connection = await self._request(outcome, connection)
                pause = min(2 * pause or _FIRST_PAUSE, _LONGEST_PAUSE) if outcome.error else 0.0
        finally:
            if connection is not None:
                connection.close()

    async def _request(self, outcome: Outcome, connection: Connection | None) -> Connection | None:
        """One request, on the connection that there is or on a new one. Returns the connection to go on with."""
        request = encode_request(self._job, outcome.index)
        outcome.began = time.perf_counter()
        answer = Answer(outcome, self.gaps)
        error = message = ""
        try:
            async with asyncio.timeout(self._job.load.timeout):
                connection = await self._exchange(request, answer, connection)
        except TimeoutError:
            error, message = "timeout", f"not complete after {self._job.load.timeout:g} s"
        except Closed as closed:
            error, message = closed.kind, str(closed)
        except OSError as failure:
            error, message = "connect", failure.strerror or str(failure)
        except asyncio.CancelledError:
            error = "interrupted" if self._stopped else "unfinished"
            raise
        finally:
            answer.end(error, message)
            # Seconds in which nothing came any more say nothing of how fast a server is.
            outcome.ended = time.perf_counter() if error != "unfinished" else answer.last or outcome.began
            if error and connection is not None:
                connection.close()
        return None if error else connection

    async def _exchange(self, request: bytes, answer: Answer, connection: Connection | None) -> Connection:
        if connection is not None and connection.usable:
            try:
                await connection.ask(request, answer)
            except Closed as closed:
                if closed.begun:
                    raise
                # The server closed an idle connection while the request was on its way: any client tries again.
            else:
                return connection
        connection = await Connection.open(self._job.target)
        await connection.ask(request, answer)
        return connection


def encode_request(job: Job, index: int) -> bytes:
    """Request number `index` as it goes over the wire."""
    target = job.target
    body = msgspec.json.encode(request_fields(job.load, index, model=target.model, usage=target.usage))
    lines = [
        f"POST {target.base}/chat/completions HTTP/1.1",
        f"Host: {target.authority}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "User-Agent: mlx-run-bench",
        f"Content-Length: {len(body)}",
    ]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body
