"""What a model's folder says about itself, together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from runner.hub.needs import is_weights
from runner.inspect.architectures import cache_layout
from runner.inspect.caches import CacheLayout
from runner.inspect.config import Config, read_config
from runner.inspect.files import BadFolder, DigestCache, FileVersion, list_files
from runner.inspect.layers import Layers, linear_layers
from runner.inspect.tensors import Group, merged, read_tensors
from runner.inspect.weights import kept


class ModelFacts(NamedTuple):
    """`tensors` are those that stay in memory, `written_by` is the tool that wrote them ("mlx", "pt" or "").

    `layout` is what a row keeps, None where config.json does not say it: `unclear` has what is wrong with it then.
    """

    config: Config
    tensors: tuple[Group, ...]
    written_by: str
    layout: CacheLayout | None
    unclear: str = ""

    def linear_layers(self) -> Layers:
        """Raises BadFolder where config.json does not say how many blocks there are."""
        return linear_layers(self.tensors, self.config, self.written_by)


def read_model(folder: Path, digest: str, cache: DigestCache) -> ModelFacts:
    """The facts of a folder that has this digest. Raises BadFolder: no config.json, or files that are not whole."""
    return cache.derive("model", digest, lambda: _read(folder, cache))


def _read(folder: Path, cache: DigestCache) -> ModelFacts:
    files = list_files(folder)
    if "config.json" not in files:
        raise BadFolder("E602", f"{folder} holds no config.json", "a model folder has config.json and *.safetensors")
    config = read_config(folder / "config.json")
    weights: list[FileVersion] = [files[name] for name in sorted(files) if is_weights(name)]
    tensors = merged(cache.remember("tensors", version, read_tensors) for version in weights)
    layout, unclear = None, ""
    try:
        layout = cache_layout(config)
        groups = kept(tensors, config)
    except BadFolder as error:
        groups, unclear = tensors.groups, error.message
    return ModelFacts(config, groups, tensors.written_by, layout, unclear)
