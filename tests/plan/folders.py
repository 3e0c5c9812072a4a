"""Model and adapter folders as small as they can be."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

GIB = 2**30
LONG_AGO = 1_700_000_000 * 10**9 + 123


def later() -> int:
    """A clock for a DigestCache by which all files are long settled."""
    return time.time_ns() + 3600 * 10**9


def safetensors(sizes: dict[str, int], *, fill: bytes = b"\0") -> bytes:
    """A safetensors file of U8 tensors with these sizes in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + fill * end


def write(path: Path, content: bytes | str) -> Path:
    """Write a file, always with the same modification time: what changes must be seen by other means."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def model(folder: Path, *, weights: int = 1000, **config: Any) -> Path:
    """A model folder whose weights take so many bytes."""
    write(folder / "config.json", json.dumps({"model_type": "llama", **config}))
    write(folder / "tokenizer.json", "{}")
    write(folder / "model.safetensors", safetensors({"w": weights}))
    return folder


def adapter(folder: Path, *, weights: int = 100, fill: bytes = b"\1") -> Path:
    """An adapter folder as mlx-lm writes them."""
    write(folder / "adapter_config.json", '{"fine_tune_type": "lora", "lora_parameters": {"rank": 1, "scale": 1}}')
    halves = {"layers.0.q_proj.lora_a": weights // 2, "layers.0.q_proj.lora_b": weights - weights // 2}
    write(folder / "adapters.safetensors", safetensors(halves, fill=fill))
    return folder


def hub_snapshot(hub: Path, repo: str, files: dict[str, bytes], *, commit: str = "c" * 40, ref: str = "main") -> Path:
    """A repository in a hub cache, laid out as huggingface_hub does: links to blobs that are named by content."""
    root = hub / f"models--{repo.replace('/', '--')}"
    write(root / "refs" / ref, commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = write(root / "blobs" / f"{abs(hash(content)):x}", content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def sparse(folder: Path, weights: int, **config: Any) -> None:
    """A model folder whose weight file claims a size and takes no room on the disk."""
    model(folder, weights=0, **config)
    path = folder / "model.safetensors"
    header = b'{"w": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (weights, weights)
    write(path, len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + weights)
