"""What an adapter is once it is read, whichever tool wrote its folder."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import msgspec

from runner.engine.arrays import read_safetensors
from runner.errors import EngineLoadError


class AdapterRefusal(EngineLoadError):  # noqa: N818 - a condition, read as `except AdapterRefusal`
    """The adapter cannot be used with this model; the message names the file or tensor at fault."""


class LowRank(msgspec.Struct, frozen=True):
    """The change to one linear layer: x · a · b is added to its output.

    `a` is [in, r] and `b` [r, out], float32, the adapter's scale already in `b`. For DoRA `magnitude` [out] replaces
    the norms of the adapted weight's rows. For a layer of experts there is one more axis in front: `a` is [experts, in,
    r], `b` [experts, r, out].
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[-1])


class Adapter(msgspec.Struct, frozen=True):
    """An adapter's changes by module path (`model.layers.0.self_attn.q_proj`).

    `keys` are the modules that its configuration says it has, by their names inside a block, in the last `last_layers`
    blocks (0 or less: in all); none where it does not say.
    """

    layers: dict[str, LowRank]
    keys: tuple[str, ...] = ()
    last_layers: int = 0


def require_folder(path: Path) -> None:
    """Raises AdapterRefusal unless `path` is an adapter folder."""
    if not path.is_dir():
        raise AdapterRefusal(f"{path} is not a folder")
    if not (path / "adapter_config.json").is_file():
        raise AdapterRefusal(f"{path} is not an adapter folder: adapter_config.json is missing")


def read_tensors(path: Path) -> dict[str, mx.array]:
    """A safetensors file's tensors in float32. Raises AdapterRefusal: missing, broken, or with a NaN in it."""
    if not path.is_file():
        raise AdapterRefusal(f"{path} is missing")
    try:
        tensors = read_safetensors(str(path))
    except (RuntimeError, ValueError) as error:
        raise AdapterRefusal(f"{path} is not a readable safetensors file: {error}") from error
    cast = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}
    finite = {name: mx.all(mx.isfinite(tensor)) for name, tensor in cast.items()}
    mx.eval(finite)
    for name, ok in finite.items():
        if not ok.item():
            raise AdapterRefusal(f"{path.name}: {name} holds a value that is not finite")
    return cast
