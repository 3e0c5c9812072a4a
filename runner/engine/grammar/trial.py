"""Whether a grammar can be compiled in bounded time and memory, found out where it does no harm.

llguidance bounds most of its work, not all of it: the intersection of a few patterns, one kilobyte of schema, took nine
minutes and 22 GB. A thread cannot be stopped, a process can. So every grammar is first compiled by a child process
that may take this long and this much.

Frames on its standard input and output: 4 bytes of big-endian length, then a grammar; 1 byte once it is compiled,
whatever came of it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import subprocess
import sys
from typing import IO, Final

from runner.errors import InvalidRequest
from runner.processes import python_module

MEMORY: Final = 1 << 30
"""Bytes. Where the system does not enforce it (macOS), the deadline has to do."""

_LENGTH: Final = 4


class Trial:
    """The child, started when it is first needed. Not for several threads."""

    def __init__(self, deadline: float) -> None:
        """`deadline` is in seconds for one grammar."""
        self._deadline = deadline
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Have the child ready, without waiting for it."""
        if self._child is None or self._child.poll() is not None:
            self.close()
            # OpenBLAS, which the engine preloads, would be of no use to it.
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            self._child = subprocess.Popen(
                python_module(__name__),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
            )

    def run(self, grammar: str) -> None:
        """Return once the child has compiled `grammar`, well or not. Raises InvalidRequest when it could not."""
        self.start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        data = grammar.encode()
        frame = len(data).to_bytes(_LENGTH, "big") + data
        with contextlib.suppress(BrokenPipeError):
            _write_all(child.stdin, frame)
        readable, _, _ = select.select([child.stdout], [], [], self._deadline)
        if readable and child.stdout.read(1):
            return
        self.close()
        limit = f"{MEMORY >> 20} MiB" if readable else f"{self._deadline:g} seconds"
        raise InvalidRequest(f"it takes more than {limit} to compile", code="grammar_too_complex")

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for stream in (child.stdin, child.stdout):
                assert stream is not None
                stream.close()
            child.wait()


def _write_all(stream: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) or 0 :]


def serve(source: IO[bytes], answers: IO[bytes]) -> None:
    """The child: compile whatever comes, until nothing comes any more."""
    # Imported here: the engine imports this module for the other end.
    from llguidance import LLMatcher  # noqa: PLC0415

    while length := source.read(_LENGTH):
        LLMatcher.validate_grammar_with_warnings(source.read(int.from_bytes(length, "big")).decode())
        answers.write(b"\n")
        answers.flush()


def main() -> None:
    """See the module."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
