"""What a draft costs while nothing is proposed, and how many graphs its rounds come to where rows come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine import decoding
from runner.engine.kv import attention_kernel
from runner.engine.kv.caches import Caches
from runner.engine.loader import LoadedModel, load
from runner.engine.speculative import proposer, rehearsal
from runner.engine.speculative.rehearsal import rehearse, sizes
from runner.protocol import Generate
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Answer, Driver, generate
from tests.engine.kv.launches import separately
from tests.engine.speculative.drafts import SLACK, Scripted, always, draft_folder, speculating
from tests.engine.tiny import encode

TEXT = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main(): return 42") * 2


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were one, with graphs that are really kept."""
    monkeypatch.setattr(attention_kernel, "launch", lambda: separately)
    monkeypatch.setattr(decoding, "rounds_ahead", lambda: True)
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture
def pair(model_folder: ModelFolder, tmp_path: Path) -> tuple[LoadedModel, Path]:
    """A model and a draft that always agrees."""
    folder = model_folder("llama")
    return load(folder, slack=SLACK), draft_folder(folder, tmp_path / "draft", "self")


def said(answers: dict[int, Answer]) -> dict[int, tuple[str, int]]:
    return {i: (answer.text, answer.tokens) for i, answer in answers.items()}


class Turns:
    """Proposes three tokens in turns of steps."""

    def __init__(self, *turns: tuple[int, int]) -> None:
        self.lengths = [length for length, steps in turns for _ in range(steps)]

    def __call__(self) -> int:
        return self.lengths.pop(0) if self.lengths else 0


def caches_calls(monkeypatch: pytest.MonkeyPatch, mine: Callable[[Caches], bool]) -> Counter[str]:
    """Counts what is done with caches that are `mine`, from now on."""
    done: Counter[str] = Counter()

    def counted(name: str, healthy: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Caches, *arguments: Any, **more: Any) -> Any:
            done[name] += mine(self)
            return healthy(self, *arguments, **more)

        return call

    for name in ("call", "call_graph", "join", "remove", "restore"):
        monkeypatch.setattr(Caches, name, counted(name, getattr(Caches, name)))
    return done


def test_a_draft_has_nothing_to_do_while_nothing_is_proposed(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come and go meanwhile, of which some the draft had read before."""
    target, folder = pair
    speculation = speculating(target, folder, Scripted(Turns((3, 4), (0, 1000))))
    layers = len(speculation.proposer._layout.upstream())
    assert layers == len(target.layout.upstream())
    driver = Driver(target, speculation=speculation, num_draft_tokens=3, max_rows=4)
    for i in range(12):
        driver.engine.submit(generate(i, prompt=TEXT[i : i + 20], max_tokens=30 + 7 * i % 20))
    while driver.engine.stats().drafted_tokens_total < 30:
        driver.engine.step()
    driver.engine._decoding._settle()
    draft: Any = speculation.proposer._caches
    assert draft is not None
    touched = caches_calls(monkeypatch, lambda caches: caches is draft or caches.layers is draft.layers)
    all_calls = caches_calls(monkeypatch, lambda caches: caches._leaves[0] is not None)
    model_calls = Counter[bool]()
    call = type(speculation.proposer._model).__call__

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        model_calls[self is speculation.proposer._model] += 1
        return call(self, *arguments, **more)

    monkeypatch.setattr(type(speculation.proposer._model), "__call__", counted)
    driver.drain()
    assert len(driver.answers) == 12
    assert not touched.total()
    assert all_calls["remove"] > 5
    assert all_calls["join"] > 5
    assert model_calls[False] > 5
    assert not model_calls[True]


def test_rows_that_left_in_plain_steps_leave_the_draft_when_it_is_wanted(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do one after the other, and the others need not be read again."""
    target, folder = pair
    requests = [generate(i, prompt=TEXT[i : i + 20], max_tokens=60 if i % 2 else 12 + 3 * i) for i in range(6)]
    expected = said(Driver(target, max_rows=6).run(requests))
    speculation = speculating(target, folder, Scripted(Turns((3, 2), (0, 28), (3, 1000))))
    driver = Driver(target, speculation=speculation, num_draft_tokens=3, max_rows=6)
    read: list[Sequence[int]] = []
    reading = proposer.Proposer._read

    def counted(self: Any, caches: Any, texts: Sequence[list[int]]) -> None:
        read.append([len(text) for text in texts])
        reading(self, caches, texts)

    monkeypatch.setattr(proposer.Proposer, "_read", counted)
    assert said(driver.run(requests)) == expected
    stats = driver.engine.stats()
    assert stats.accepted_tokens_total > 0.9 * stats.drafted_tokens_total - 20
    assert len(read) == 2
    assert 1 < len(read[1]) < 4
    assert max(read[1]) < 30, "of each only what it has missed"


def test_a_draft_of_whose_rows_many_have_left_lets_go_of_all(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposer, "_MOST_GONE", 1)
    target, folder = pair
    speculation = speculating(target, folder, Scripted(Turns((3, 2), (0, 1000))))
    driver = Driver(target, speculation=speculation, num_draft_tokens=3, max_rows=6)
    for i in range(6):
        driver.engine.submit(generate(i, prompt=TEXT[i : i + 20], max_tokens=20 + 3 * i))
    held: list[bool] = []
    remove = speculation.proposer.remove

    def removing(*arguments: Any) -> None:
        remove(*arguments)
        held.append(speculation.proposer.nbytes > 0)

    monkeypatch.setattr(speculation.proposer, "remove", removing)
    driver.drain()
    assert len(held) > 3
    assert held == sorted(held, reverse=True)
    assert 1 <= sum(held) <= 2, "one has left before the last round"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11}, {"temperature": 0.9, "top_p": 0.8}])
def test_batches_of_nearly_as_many_rows_share_the_graphs_of_their_rounds(
    pair: tuple[LoadedModel, Path], sampling: dict[str, Any]
) -> None:
    target, folder = pair
    requests = [generate(i, prompt=TEXT[i : i + 20], max_tokens=40 + 5 * i, **sampling) for i in range(16)]
    plain = Driver(target, max_rows=16).run(requests)
    speculation = speculating(target, folder, always(3))  # type: ignore[arg-type]
    driver = Driver(target, speculation=speculation, num_draft_tokens=3, max_rows=16)
    for request in requests:
        driver.engine.submit(request)
    seen, built = set(), []
    while driver.engine.busy:
        before = speculation.proposer.building
        driver.engine.step()
        rows = len(driver.engine._batch.rows)
        if rows > 8:
            seen.add(rows)
            built.append(speculation.proposer.building > before)
    assert len(seen) >= 2
    assert sum(built) == 3, "two are built, and one is kept"
    if "top_p" not in sampling:
        assert said(driver.answers) == said(plain)
        stats = driver.engine.stats()
        assert stats.accepted_tokens_total > 0.8 * stats.drafted_tokens_total


# ------------------------------------------------------------- rehearsals


def test_a_rehearsal_has_batches_of_all_sizes_and_times_their_steps(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_SECONDS", 100.0)
    target, folder = pair
    speculation = speculating(target, folder)
    driver = Driver(target, speculation=speculation, num_draft_tokens=4, max_rows=12)
    costs = speculation.policy.costs
    assert driver.engine.rehearse() is None
    assert {length: sorted(found) for length, found in costs._rehearsed.items()} == {n: [1, 8, 12] for n in (0, 2, 4)}
    assert not driver.frames
    assert not speculation.policy.steps
    assert not costs.timed
    assert driver.engine.stats().rows == 0
    before = speculation.proposer.building
    for i in range(12):
        driver.engine.submit(generate(i, prompt=TEXT[i : i + 20], max_tokens=60))
    policy: Any = always(4)
    speculation.policy = policy
    driver.drain()
    assert speculation.proposer.building == before, "their graphs are there"


def test_a_rehearsal_ends_when_most_rows_were_timed_together(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not go on to the rows' ends."""
    monkeypatch.setattr(rehearsal, "_SECONDS", 100.0)
    monkeypatch.setattr(rehearsal, "_STEPS", 100)
    target, folder = pair
    driver = Driver(target, speculation=speculating(target, folder), num_draft_tokens=4, max_rows=12)
    steps, step = [0], driver.engine.step

    def counted() -> None:
        steps[0] += 1
        step()

    monkeypatch.setattr(driver.engine, "step", counted)
    assert driver.engine.rehearse() is None
    assert steps[0] < 9 * 40, "of three sizes, each of three lengths"


def test_sizes_of_rehearsals() -> None:
    assert [sizes(n) for n in (1, 2, 8, 16, 128)] == [[1], [1, 2], [1, 8], [1, 16, 8], [1, 128, 32, 8]]


def test_only_one_row_has_to_come_through_a_rehearsal(
    pair: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, folder = pair
    speculation = speculating(target, folder)
    tried: list[tuple[int, int]] = []

    def failing_from(rows: int) -> str | None:
        del tried[:]

        def trial(requests: Sequence[Generate], enough: Callable[[], bool]) -> str | None:
            tried.append((len(requests), requests[0].max_tokens or 0))
            return "no memory" if len(requests) >= rows else None

        return rehearse(speculation, 4, 64, trial)

    assert failing_from(1) == "no memory"
    assert len(tried) == 1
    assert failing_from(32) is None
    assert [rows for rows, _ in tried] == [1, 1, 1, 64]
    assert failing_from(100) is None
    assert [rows for rows, _ in tried] == [1] * 3 + [64] * 3 + [32] * 3 + [8] * 3
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    assert failing_from(100) is None
    assert [rows for rows, _ in tried] == [1] * 3, "there is no time for more"
