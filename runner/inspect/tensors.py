"""What a safetensors file holds, by its header: names, types and shapes, none of the data.

Format (huggingface/safetensors, README "Format"): 8 bytes of length, little-endian, that many bytes of JSON, data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.inspect.files import BadFolder

_MAX_HEADER_BYTES: Final = 100_000_000  # as the safetensors library has it
_NUMBER: Final = re.compile(r"(?<![^.])\d{1,5}(?![^.])")
"""A whole part of a dotted name; longer ones are no block numbers."""

FLOATING: Final = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that a model computes in. FP8 is stored, and unpacked when it is read."""


class Group(NamedTuple):
    """Tensors that are alike: one name but for numbers (`model.layers.*.mlp.up_proj.weight`), one type and shape.

    `blocks` has a bit for each first number of the names, 0 where they have none; `nbytes` is of all `members`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: int
    members: int
    nbytes: int

    @property
    def values(self) -> int:
        """Numbers in all of them together."""
        return math.prod(self.shape) * self.members

    @property
    def example(self) -> str:
        """The name of one of them."""
        return at_block(self.name, first_block(self.blocks)).replace("*", "0")


class Tensors(NamedTuple):
    """The tensors of a file, or of several. `written_by` is `format` of the header's metadata: "mlx", "pt" or ""."""

    groups: tuple[Group, ...]
    written_by: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(group.nbytes for group in self.groups)


def at_block(pattern: str, block: int) -> str:
    """A pattern's name with its first number filled in."""
    return pattern.replace("*", str(block), 1)


def first_block(blocks: int) -> int:
    """The lowest number of a set of blocks; 0 of an empty one."""
    return (blocks & -blocks).bit_length() - 1 if blocks else 0


class Tensor(NamedTuple):
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and `format` of its metadata.

    Raises BadFolder where the header does not fit the file, as while it is being written.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                message = f"{path} is no whole safetensors file"
                raise BadFolder("E603", message, "it may be half-written", incomplete=True)
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor(entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tool = str(metadata.get("format", ""))
    except OSError as error:
        raise BadFolder("E603", f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        message = f"{path} has no safetensors header"
        raise BadFolder("E603", message, "it may be half-written", incomplete=True) from None
    if size != 8 + length + end:
        message = f"{path} has {size} bytes where its header says {8 + length + end}"
        raise BadFolder("E603", message, "it may be half-written", incomplete=True)
    return tensors, tool


def _tensor(entry: dict[str, Any]) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not (0 <= start <= stop and all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(entry)
    return Tensor(str(entry["dtype"]), shape, stop - start)


def read_tensors(path: Path) -> Tensors:
    """Raises BadFolder as `read_header` does."""
    header, tool = read_header(path)
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, tensor in header.items():
        pattern, number = numbered(name)
        entry = found.setdefault((pattern, tensor.dtype, tensor.shape), [0, 0, 0])
        if number is not None:
            entry[0] |= 1 << number
        entry[1] += 1
        entry[2] += tensor.nbytes
    return Tensors(tuple(Group(*key, *entry) for key, entry in found.items()), tool)


@lru_cache(4096)  # the models of a manifest have their names in common
def numbered(name: str) -> tuple[str, int | None]:
    """A name with `*` for its numbers, and the first of them."""
    number = _NUMBER.search(name)
    return (name, None) if number is None else (_NUMBER.sub("*", name), int(number[0]))


def merged(parts: Iterable[Tensors]) -> Tensors:
    """The tensors of several files as one."""
    found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    written_by = set()
    for part in parts:
        written_by.add(part.written_by)
        for group in part.groups:
            entry = found.setdefault((group.name, group.dtype, group.shape), [0, 0, 0])
            entry[0] |= group.blocks
            entry[1] += group.members
            entry[2] += group.nbytes
    tool = written_by.pop() if len(written_by) == 1 else ""
    return Tensors(tuple(Group(*key, *entry) for key, entry in found.items()), tool)
