"""What a step's frame costs the engine's thread, and when the runner has it: encoding, writing, and the way between.

    python tests/bench/transport_cost.py [--rows 128] [--steps 400] [--python-ms 1.5] [--device-ms 3]

The engine's transport is the real one. After each frame its thread does what an engine does in a step: Python, with the
interpreter's lock held, and then a wait without it, twice (it comes back once to start the graph, and once for tokens).
Frames are written by the thread that writes, by the engine's own, and not at all, in turn. A process of its own reads
them, and takes `--slow-ms` after each: what the engine's thread notices of a runner that does not keep up.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runner.engine.transport import Connected, Transport  # noqa: E402
from runner.protocol import Delta, Step, encode_frame  # noqa: E402

READER = """
import socket, struct, sys, time
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
data, slow, stamps = b"", float(sys.argv[2]), []
while True:
    piece = peer.recv(262144)
    now = time.perf_counter()
    if not piece:
        break
    data += piece
    while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
        data = data[end:]
        stamps.append(now)
        if slow:
            time.sleep(slow)
sys.stdout.buffer.write(struct.pack(f"{len(stamps)}d", *stamps))
"""


WAYS = ("not sent", "by the thread that writes", "by the engine's")
BLOCK = 50
"""Steps of one way before the next."""


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Connect, step, print."""
    transport = Transport(folder / "s")
    transport.start()
    command = [sys.executable, "-c", READER, str(folder / "s"), str(options.slow_ms / 1e3)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    event = transport.inbox.get()
    assert isinstance(event, Connected), event
    transport.answer(event.connection)
    step = Step([Delta(row, " token", 1) for row in range(options.rows)])
    rounds = calibrated(options.python_ms / 2e3)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    sending: dict[str, list[float]] = {way: [] for way in WAYS}
    sent: list[tuple[str, float]] = []
    for number in range(len(WAYS) * options.steps):
        way = WAYS[number // BLOCK % len(WAYS)]
        transport._all_at_once = way == WAYS[2]
        at = time.perf_counter()
        if way == WAYS[0]:
            encode_frame(step)
        else:
            sent.append((way, at))
            transport.send(step)
        sending[way].append(time.perf_counter() - at)
        for _ in range(2):
            python(rounds)
            time.sleep(options.device_ms / 2e3)
        taken[way].append(time.perf_counter() - at)
    transport.close(30.0)
    output, _ = reader.communicate(timeout=30)
    stamps = struct.unpack(f"{len(output) // 8}d", output)
    assert len(stamps) == len(sent), f"{len(stamps)} frames of {len(sent)} arrived"
    print(f"{options.rows} rows, a frame of {len(encode_frame(step)):,} bytes; median / p99 / most, in µs")
    for way in WAYS:
        read = [arrived - began for arrived, (its, began) in zip(stamps, sent, strict=True) if its == way]
        print(way)
        for name, values in (("encode and send", sending[way]), ("until it is read", read), ("step", taken[way])):
            if values:
                micros = sorted(value * 1e6 for value in values)
                p99 = micros[len(micros) * 99 // 100]
                print(f"  {name:17} {statistics.median(micros):10,.0f} {p99:10,.0f} {micros[-1]:10,.0f}")


def python(rounds: int) -> int:
    """Something that holds the interpreter's lock."""
    total = 0
    for number in range(rounds):
        total += number
    return total


def calibrated(seconds: float) -> int:
    """Rounds of `python` that take so long where nobody else wants the lock."""
    took = []
    for _ in range(20):
        began = time.perf_counter()
        python(10_000)
        took.append(time.perf_counter() - began)
    return max(1, int(10_000 * seconds / min(took)))


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--python-ms", type=float, default=1.5, help="of a step, with the interpreter's lock")
    parser.add_argument("--device-ms", type=float, default=3.0, help="of a step, without it")
    parser.add_argument("--slow-ms", type=float, default=0.0, help="what the reader does after each frame")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
