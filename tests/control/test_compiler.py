"""The process that reads manifests, when it ends in the middle of something."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest

from runner.control.compiler import Compiler
from runner.errors import RunnerError


class BreaksOff(io.BytesIO):
    """An answer that ends with its writer, in the middle."""

    def __init__(self, stream: Any) -> None:
        super().__init__(pickle.dumps("x" * 1000)[:500])
        self._stream = stream

    def write(self, data: Any) -> int:
        return len(data)

    def close(self) -> None:
        super().close()
        self._stream.close()


def test_an_answer_that_breaks_off_is_said_and_the_next_is_whole(tmp_path: Path) -> None:
    manifest = tmp_path / "dev.yaml"
    manifest.write_text("name: dev")
    compiler = Compiler()
    try:
        compiler.start()
        compiler._stream = BreaksOff(compiler._stream)  # type: ignore[assignment]
        with pytest.raises(RunnerError, match="the process that reads manifests ended"):
            compiler.compile([manifest])
        assert compiler.compile([manifest]).paths == (manifest,)
    finally:
        compiler.stop()
