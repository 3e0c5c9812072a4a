"""Headers of safetensors files: what is in them, and that a file which is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.inspect.files import BadFolder
from runner.inspect.tensors import read_tensors
from tests.plan.folders import safetensors, write

WHOLE = safetensors({"w": 100})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no whole safetensors file"),
        (WHOLE[:5], "is no whole safetensors file"),
        (WHOLE[:40], "is no whole safetensors file"),
        (WHOLE[:-1], "bytes where its header says"),
        (WHOLE + b"x", "bytes where its header says"),
        (b"\0" * 200, "is no whole safetensors file"),
        (b"\xff" * 200, "is no whole safetensors file"),
        ((50).to_bytes(8, "little") + b"{" * 100, "has no safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "has no safetensors header"),
        ((7).to_bytes(8, "little") + b'{"w":1}', "has no safetensors header"),
        ((30).to_bytes(8, "little") + b'{"w":{"data_offsets":[0,"1"]}}', "has no safetensors header"),
        ((31).to_bytes(8, "little") + b'{"w":{"data_offsets":[0,1,2]} }', "has no safetensors header"),
    ],
)
def test_files_that_are_not_whole(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadFolder) as caught:
        read_tensors(write(tmp_path / "model.safetensors", content))
    assert message in caught.value.message
    assert caught.value.incomplete
