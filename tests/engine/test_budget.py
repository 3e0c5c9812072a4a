"""Many requests of any length against room for ten of them: every one is served or refused, and memory holds."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from runner.engine.loader import load
from runner.engine.memory import cache_bytes_per_token
from runner.inspect.estimate import Limits, model_memory
from runner.inspect.files import DigestCache
from runner.inspect.model import read_model
from tests.engine.drive import Driver, active_memory, generate
from tests.engine.tiny import build_model

pytestmark = pytest.mark.mlx

LONGEST = 96
STEP = 64
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize("bounded", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_two_hundred_against_room_for_ten(bounded: bool, tmp_path: Path) -> None:
    chosen = random.Random(7)
    loaded = load(build_model(tmp_path, config=WIDE))
    each = 256 * cache_bytes_per_token(loaded.model, loaded.layout)
    facts = read_model(tmp_path, "x", DigestCache())
    allowed = Limits(rows=64, context=LONGEST, prefill_step=STEP, prefix_cache=1 << 22)
    working = model_memory(facts, [], None, allowed, float32=True).working(STEP)
    budget = int(loaded.weights_bytes + working + 10 * each)
    idle = active_memory() - loaded.weights_bytes
    driver = Driver(
        loaded,
        memory_limit=budget,
        max_rows=64,
        max_queue=150,
        prefix_cache_bytes=1 << 22,
        max_context=LONGEST,
        prefill_step_size=STEP,
    )
    driver.engine.budget.working = working
    sizes = [(chosen.randint(2, 60), chosen.randint(1, 30)) for _ in range(200)]
    for number, (prompt, answer) in enumerate(sizes):
        tokens = [chosen.randint(5, 300) for _ in range(prompt)]
        driver.engine.submit(generate(number, prompt=tokens, max_tokens=answer if bounded else 0))
    most_rows = most_active = 0
    while driver.engine.busy:
        driver.engine.step()
        stats = driver.engine.stats()
        most_rows = max(most_rows, stats.rows)
        most_active = max(most_active, mx.get_active_memory() - idle)
        assert stats.reserved_bytes <= budget or stats.rows <= 1
    served = [answer for answer in driver.answers.values() if answer.rejected is None]
    refused = [answer for answer in driver.answers.values() if answer.rejected is not None]
    assert len(served) + len(refused) == 200
    assert {answer.finish_reason for answer in served} <= {"stop", "length"}
    assert {answer.rejected.status for answer in refused if answer.rejected} <= {503}
    assert len(served) == 150, "the queue holds so many"
    assert most_rows >= 5, "they share the room"
    # The allocator counts what it rounds up to, and that depends on what it had before.
    assert loaded.weights_bytes + 5 * each < most_active <= 1.03 * budget
    assert driver.one(prompt=[5, 6, 7], max_tokens=3).tokens == 3
