"""What stands for the files of a model or an adapter: digests that are cheap to take again on every pass.

A model's weights are known by what the file system (or the hub's cache) says of the files, so 100 GB cost a few
`stat` calls; everything small, and adapters, by content. Contents are read once for each version of a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.inspect.files import BadFolder as BadFolder
from runner.inspect.files import DigestCache as DigestCache
from runner.inspect.files import FileVersion as FileVersion
from runner.inspect.files import content_digest, json_object, list_files
from runner.inspect.files import file_version as file_version
from runner.inspect.tensors import read_tensors

_SMALL_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


@dataclass(frozen=True, slots=True)
class FolderDigest:
    """`weights_bytes` is what the weights take in memory, by their headers."""

    digest: str
    weights_bytes: int


def model_digest(folder: Path, cache: DigestCache) -> FolderDigest:
    """The digest of a model folder.

    Raises BadFolder where config.json or weights are missing, or a weight file is not whole.
    """
    files = list_files(folder)
    if "config.json" not in files:
        hint = "a model folder has config.json and *.safetensors"
        if "adapter_config.json" in files:
            hint = "it holds an adapter: write it under the adapters of its model"
        raise BadFolder("E602", f"{folder} holds no config.json", hint)
    weights = {name for name in files if name.startswith("model") and name.endswith(".safetensors")}
    if not weights:
        message = f"{folder} holds no model*.safetensors"
        raise BadFolder("E602", message, "convert the model with mlx_lm.convert", incomplete=True)
    missing = _indexed(files, cache) - files.keys()
    if missing:
        message = f"{folder} lacks {len(missing)} of the files in its index, such as {min(missing)}"
        raise BadFolder("E602", message, "download or copy it again", incomplete=True)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        version = files[name]
        if name in weights:
            _update(digest, name, version.blob or f"{version.size} {version.mtime_ns} {version.inode}")
        elif name.endswith(_SMALL_SUFFIXES):
            _update(digest, name, version.blob or cache.remember("content", version, content_digest))
    return FolderDigest(digest.hexdigest(), _weights_bytes((files[name] for name in weights), cache))


def adapter_digest(folder: Path, cache: DigestCache) -> FolderDigest:
    """The digest of an adapter's folder: of the contents of its configuration and of the weights that go with it.

    Those are PEFT's `adapter_model.safetensors` where the configuration has a `peft_type`, else mlx-lm's
    `adapters.safetensors`; checkpoints beside them do not count. Raises BadFolder where one of the two files is
    missing, or not whole.
    """
    files = list_files(folder)
    config = files.get("adapter_config.json")
    if config is None:
        hint = "an adapter folder has it beside its weights"
        if "config.json" in files:
            hint = "it holds a model: write it as one of its own"
        raise BadFolder("E602", f"{folder} holds no adapter_config.json", hint)
    name = cache.remember("adapter weights", config, _adapter_weights)
    weights = files.get(name)
    if weights is None:
        raise BadFolder("E602", f"{folder} holds no {name}", "its adapter_config.json asks for it", incomplete=True)
    size = _weights_bytes([weights], cache)
    digest = hashlib.blake2b(digest_size=16)
    for version in (config, weights):
        _update(digest, version.path.rpartition("/")[2], cache.remember("content", version, content_digest))
    return FolderDigest(digest.hexdigest(), size)


def _indexed(files: dict[str, FileVersion], cache: DigestCache) -> set[str]:
    index = files.get("model.safetensors.index.json")
    return cache.remember("index", index, _index_files) if index is not None else set()


def _index_files(path: Path) -> set[str]:
    weight_map = json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadFolder("E603", f"{path} has no weight_map", "download or copy it again")
    return {str(name) for name in weight_map.values()}


def _adapter_weights(path: Path) -> str:
    return "adapter_model.safetensors" if "peft_type" in json_object(path) else "adapters.safetensors"


def _weights_bytes(versions: Iterable[FileVersion], cache: DigestCache) -> int:
    return sum(cache.remember("tensors", version, read_tensors).nbytes for version in versions)


def _update(digest: hashlib.blake2b, name: str, value: str) -> None:
    digest.update(f"{name}\0{value}\n".encode())
