"""Several processes of clients, which share each level among them."""

from __future__ import annotations

import os
import subprocess
from types import TracebackType
from typing import Final

import msgspec

from runner.bench.job import Job, Report
from runner.bench.worker import read_frame, write_frame
from runner.errors import RunnerError
from runner.processes import python_module

CLIENTS_PER_PROCESS: Final = 32
"""Where there are cores. One process follows 60,000 stream events a second and more (tests/bench/client_cost.py), but
events that come together are timed one after the other: what the last of 128 waits is not the server's."""

MOST_PROCESSES: Final = 4


def processes_for(clients: int) -> int:
    """How many processes a level of `clients` takes: a quarter of the cores at most, the rest are the server's."""
    cores = os.cpu_count() or 1
    return max(1, min(-(-clients // CLIENTS_PER_PROCESS), cores // 4, MOST_PROCESSES))


class Workers:
    """The processes. They start idle, and end with the `with` block."""

    def __init__(self, count: int) -> None:
        self._stopping = False
        self._processes = [
            subprocess.Popen(
                python_module("runner.bench.worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
            for _ in range(count)
        ]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def run(self, job: Job, processes: int) -> list[Report]:
        """Have `processes` of them do a job together. Raises RunnerError when one ends, unless it was stopped."""
        shares = _shares(job, min(processes, len(self._processes), job.clients))
        used = list(zip(self._processes, shares, strict=False))
        try:
            for process, share in used:
                assert process.stdin is not None, "a pipe"
                write_frame(process.stdin, share)
        except BrokenPipeError:
            pass  # reading says which
        reports = []
        for process, _ in used:
            assert process.stdout is not None, "a pipe"
            data = read_frame(process.stdout)
            if data is not None:
                reports.append(msgspec.msgpack.decode(data, type=Report))
            elif not self._stopping:
                raise RunnerError("a process of the load generator ended; its output says why")
        return reports

    def stop(self) -> None:
        """End what runs, early. Safe in a signal handler."""
        self._stopping = True
        for process in self._processes:
            process.terminate()


def _shares(job: Job, count: int) -> list[Job]:
    """The job cut into `count` jobs of nearly as many clients."""
    replace = msgspec.structs.replace
    whole, rest = divmod(job.clients, count)
    return [
        replace(job, clients=whole + (number < rest), first=job.first + number * job.stride, stride=job.stride * count)
        for number in range(count)
    ]
