"""What a step's frame costs the engine's thread, and when the runner has it: encoding, writing, and the way between.

    python tests/bench/transport_cost.py [--rows 128] [--steps 400] [--python-ms 1.5] [--device-ms 3] [--awaited]

The engine's transport is the real one. After each frame its thread does what an engine does in a step: Python, with the
interpreter's lock held, and then a wait without it. With `--awaited` an answer ends in every frame, which has the
engine write it at once. A process of its own reads the frames, and takes `--slow-ms` after each: what the engine's
thread notices of a runner that does not keep up.
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
from runner.protocol import Delta, Step, Usage, encode_frame  # noqa: E402

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


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Connect, step, print."""
    transport = Transport(folder / "s")
    transport.start()
    command = [sys.executable, "-c", READER, str(folder / "s"), str(options.slow_ms / 1e3)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE)
    event = transport.inbox.get()
    assert isinstance(event, Connected), event
    transport.answer(event.connection)
    usage = Usage(1, 1) if options.awaited else None
    step = Step([Delta(row, " token", 1, usage=None if row else usage) for row in range(options.rows)])
    encoding, sending, began = [], [], []
    for _ in range(options.steps):
        at = time.perf_counter()
        encode_frame(step)
        between = time.perf_counter()
        transport.send(step)
        began.append(between)
        sending.append(time.perf_counter() - between)
        encoding.append(between - at)
        until = time.perf_counter() + options.python_ms / 1e3
        while time.perf_counter() < until:
            pass
        time.sleep(options.device_ms / 1e3)
    transport.close(30.0)
    output, _ = reader.communicate(timeout=30)
    stamps = struct.unpack(f"{len(output) // 8}d", output)
    assert len(stamps) == options.steps, f"{len(stamps)} frames of {options.steps} arrived"
    delays = [arrived - sent for arrived, sent in zip(stamps, began, strict=True)]
    print(f"{options.rows} rows, a frame of {len(encode_frame(step)):,} bytes; median / p99 / most, in µs")
    for name, values in (("encode", encoding), ("encode and send", sending), ("until it is read", delays)):
        micros = sorted(value * 1e6 for value in values)
        p99 = micros[len(micros) * 99 // 100]
        print(f"  {name:17} {statistics.median(micros):10,.0f} {p99:10,.0f} {micros[-1]:10,.0f}")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--python-ms", type=float, default=1.5, help="of a step, with the interpreter's lock")
    parser.add_argument("--device-ms", type=float, default=3.0, help="of a step, without it")
    parser.add_argument("--slow-ms", type=float, default=0.0, help="what the reader does after each frame")
    parser.add_argument("--awaited", action="store_true", help="an answer ends in every frame")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
