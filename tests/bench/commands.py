"""How long commands take from their start to their end, on a small manifest and on one of 1,000 models.

The models of the large one are folders of their own, each with its configuration, tokenizer and weights (headers whose
data are holes), and all have two adapters: `validate` reads every one of them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.inspect.folders import queries, write_llama, write_lora

MLX_RUN = Path(sys.executable).parent / "mlx-run"


def command_times(arguments: Sequence[str], environment: Mapping[str, str], repeat: int) -> list[float]:
    """Milliseconds of `mlx-run ARGUMENTS`, which succeeds each time."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        done = subprocess.run([str(MLX_RUN), *arguments], env=environment, capture_output=True, text=True, check=False)
        times.append((time.perf_counter() - began) * 1e3)
        assert done.returncode == 0, done.stderr[-2000:]
    return times


def write_large(folder: Path, count: int) -> Path:
    """A manifest of so many models on ten servers, with everything that it names."""
    for adapter in ("a", "b"):
        write_lora(folder / "adapters" / adapter, queries(range(2)))
    lines = ["name: large", "servers:"]
    for server in range(10):
        names = ", ".join(_name(number) for number in range(server, count, 10))
        lines.append(f"  s{server}: {{port: {20000 + server}, models: [{names}]}}")
    lines.append("models:")
    for number in range(count):
        write_llama(folder / "models" / str(number), max_position_embeddings=2048 + number)
        lines += [
            f"  {_name(number)}:",
            f"    source: ./models/{number}",
            f"    aliases: [alias-{number}]",
            "    adapters: {a: ./adapters/a, b: ./adapters/b}",
            "    kv_cache: {max_context: 2048, prefix_cache: 1MiB}",
            "    batching: {max_rows: 8}",
            "    generation: {temperature: 0.7, max_tokens: 1024}",
        ]
    manifest = folder / "large.yaml"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def _name(number: int) -> str:
    return f"model-{number:04}"
