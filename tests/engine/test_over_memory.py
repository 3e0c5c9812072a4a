"""A real engine process whose limit is below what it uses: it says so and ends, for another to take its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.protocol import Configure, Generate, Overrun, Stats
from tests.engine.client import engine_child
from tests.engine.tiny import build_model

pytestmark = pytest.mark.mlx
MIB = 2**20


def test_far_over_its_limit_it_says_so_and_ends(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    folder = build_model(tmp_path / "model", config=large)
    with engine_child(tmp_path / "engine", folder) as engine:
        client = engine.ready()
        client.send(Configure(memory_limit_bytes=200 * MIB), Generate(id=1, prompt=[5, 6], max_tokens=3))
        assert client.finish(1).tokens == 3
        client.wait(Stats, budget_bytes=200 * MIB)
        client.send(Configure(memory_limit_bytes=4 * MIB))
        found = client.wait(Overrun)
        assert found.limit == 4 * MIB
        assert found.used > 0.99 * (folder / "model.safetensors").stat().st_size
        assert engine.exit_code() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told")
def test_it_goes_before_the_runner_when_the_machine_is_out_of_memory(tmp_path: Path) -> None:
    with engine_child(tmp_path / "engine", build_model(tmp_path / "model")) as engine:
        engine.ready()
        adjusted = int(Path(f"/proc/{engine.process.pid}/oom_score_adj").read_text())
        assert adjusted > int(Path("/proc/self/oom_score_adj").read_text())
