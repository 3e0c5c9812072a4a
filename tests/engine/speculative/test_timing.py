"""What calls cost is measured as steps will make them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from runner.engine.kv import attention_kernel
from runner.engine.kv.caches import Caches
from runner.engine.loader import load
from runner.engine.speculative import loading
from tests.engine.conftest import ModelFolder
from tests.engine.kv.launches import separately
from tests.engine.speculative.drafts import SLACK


def test_steps_whose_graphs_are_kept_are_timed_as_such(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    loaded = load(model_folder("llama"))
    called: list[tuple[int, ...]] = []
    healthy = loading.TracedCalls.__call__

    def call(self: loading.TracedCalls, caches: Caches, tokens: mx.array) -> mx.array:
        called.append(tuple(tokens.shape))
        return healthy(self, caches, tokens)

    monkeypatch.setattr(loading.TracedCalls, "__call__", call)
    curve = loading.timed(loaded)
    assert sorted(set(called)) == [(1, 1), (4, 8), (5, 8), (8, 1), (8, 8)]
    assert 0 < curve(1) <= curve(8) <= curve(32) <= curve(40) <= curve(64) <= curve(200)


def test_others_are_timed_by_single_calls(model_folder: ModelFolder) -> None:
    curve = loading.timed(load(model_folder("llama")))
    assert 0 < curve(1) <= curve(32)


def test_what_a_draft_reads_is_timed_as_it_reads(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    loaded = load(model_folder("llama"))
    called: list[tuple[int, ...]] = []
    healthy = Caches.call

    def call(self: Caches, model: object, tokens: mx.array, lengths: list[int] | None = None) -> mx.array:
        if lengths is not None:
            called.append((*tokens.shape, min(lengths), max(lengths)))
        return healthy(self, model, tokens, lengths)

    monkeypatch.setattr(Caches, "call", call)
    curve = loading.reading(loaded)
    assert sorted(set(called)) == [(32, 2, 1, 2), (32, 16, 15, 16), (32, 64, 63, 64)]
    assert 0 < curve(64) <= curve(512) <= curve(2048)
    del called[:]
    costs = loading.start_speculation(loaded, loaded, SLACK).policy.costs
    assert called, "where graphs are kept, its steps do not tell"
    assert costs.catching_up(2048) >= costs.catching_up(64)
    monkeypatch.undo()
    plain = load(model_folder("llama"))
    costs = loading.start_speculation(plain, plain, SLACK).policy.costs
    both = costs.catching_up(1) + costs.catching_up(2)
    assert both == pytest.approx(costs.proposing(1, 2)), "its steps tell it there"
