"""How many operations a round is beside the models' own calls: each is a launch on a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine import batch as batches
from runner.engine.kv.layout import Layout
from runner.engine.loader import load
from runner.engine.speculative.costs import Costs, Curve
from runner.engine.speculative.proposer import Proposer
from runner.engine.speculative.speculation import Speculation
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.operations import one, operations
from tests.engine.speculative.drafts import always
from tests.engine.tiny import encode

TEXT = encode("the quick brown fox jumps over the lazy dog")


@pytest.mark.parametrize("proposed", [1, 4])
def test_the_verdict_on_greedy_rows_is_eight_operations(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proposed: int
) -> None:
    loaded = load(model_folder("llama"))
    target = replace(loaded, layout=Layout(loaded.model, launch=one))
    draft = Proposer(loaded.model, Layout(loaded.model, launch=one), loaded.vocabulary, loaded.vocabulary)
    speculation = Speculation(draft, Costs(Curve({1: 1.0}), Curve({1: 1.0})))
    policy: Any = always(proposed)
    speculation.policy = policy
    driver = Driver(target, speculation=speculation, num_draft_tokens=proposed, max_rows=3)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=TEXT[: 9 + 3 * i], max_tokens=100))
    for _ in range(4):
        driver.engine.step()
    batch = driver.engine._batch
    driver.engine._decoding._settle()
    assert draft._caches is not None
    started: list[mx.array] = []
    with monkeypatch.context() as patch:
        patch.setattr(batches, "start", lambda *arrays: started.extend(arrays))
        batch.forward(proposed)
        assert batch._proposal is not None
        assert batch._logits is not None
        models = operations(tmp_path, batch._logits)
        assert models["ArgReduce"] == proposed, "a proposal of greedy rows is the largest logit"
        batch.sample(None)
    # What the next round begins with as well: the last two tokens, and where the rows are in both caches.
    following = (batch._last, batch.caches._positions.starts, draft._caches._positions.starts)
    assert all(array is not None for array in following)
    found = operations(tmp_path, *started, *following) - models
    assert found == Counter({"ArgReduce": 2, "NotEqual": 1, "Add": 3, "Concatenate": 1, "GatherAxis": 1})
