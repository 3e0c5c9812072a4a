"""The loop beside HTTP has what a served engine has."""

from __future__ import annotations

from pathlib import Path

from tests.bench.engine_loop import ClosedLoop
from tests.engine.tiny import build_model


def test_it_keeps_prefixes(tmp_path: Path) -> None:
    loop = ClosedLoop(build_model(tmp_path / "model"), 2)
    question = {"rows": 2, "requests": 3, "words": 4, "seed": 0, "first": 0, "max_tokens": 3, "sampling": {}}
    assert loop.run(question)["tokens"] == 9
    assert loop.engine.stats().prefix_cache_bytes > 0
