"""Rows that join, leave, are cut and are padded compute what each computes alone; a row costs its own copy at most."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine.arrays import to_list
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.kv.planes import Planes
from runner.engine.loader import LoadedModel, load
from tests.engine.conftest import ModelFolder
from tests.engine.drive import active_memory
from tests.engine.kv.launches import OnDevice, OnHost

SLACK = 5
FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2"]


@pytest.fixture(scope="module")
def loaded(model_folder: ModelFolder) -> dict[str, LoadedModel]:
    return {kind: load(model_folder(kind)) for kind in FAMILIES}


def alone(model: LoadedModel, tokens: Sequence[int]) -> mx.array:
    """[vocabulary]: what follows on `tokens`, without any cache."""
    answer: mx.array = model.model(mx.array([list(tokens)]))[0, -1]
    return answer


def close(a: mx.array, b: mx.array) -> bool:
    return bool(mx.allclose(a, b, rtol=1e-3, atol=1e-3).item())


@dataclass
class Rows:
    """Caches, and the tokens that each row should have."""

    model: LoadedModel
    layout: Layout
    draw: random.Random
    caches: Caches | None = None
    tokens: list[list[int]] = field(default_factory=list)
    kept: list[tuple[Beginning, list[int]]] = field(default_factory=list)

    def some(self, most: int) -> list[int]:
        return [self.draw.randrange(self.model.vocabulary) for _ in range(self.draw.randint(1, most))]

    def join(self) -> None:
        """Up to three rows, prefilled together, some with a beginning that was kept."""
        begun, new = [], []
        for _ in range(self.draw.randint(1, 3)):
            if self.kept and self.draw.random() < 0.6:
                beginning, tokens = self.draw.choice(self.kept)
                whole = beginning.state is not None
                length = beginning.length if whole else self.draw.randint(1, beginning.length)
                begun.append(replace(beginning, length=length))
                new.append(tokens[:length])
            else:
                begun.append(None)
                new.append([])
        caches = self.layout.restore(begun)
        self.call(caches, new, [self.some(40) for _ in new])
        if self.caches is None:
            self.caches = caches
        else:
            self.caches.join(caches)
        self.tokens += new

    def call(self, caches: Caches, rows: list[list[int]], new: list[list[int]]) -> None:
        width = max(map(len, new))
        padded = mx.array([tokens + [0] * (width - len(tokens)) for tokens in new])
        answers = caches.call(self.model.model, padded, [len(tokens) for tokens in new])
        for i, (row, tokens) in enumerate(zip(rows, new, strict=True)):
            row += tokens
            assert close(answers[i, len(tokens) - 1], alone(self.model, row)), f"row {i} of {len(rows)}"

    def decode(self) -> None:
        assert self.caches is not None
        self.call(self.caches, self.tokens, [self.some(1) for _ in self.tokens])

    def verify(self) -> None:
        """Several tokens a row, of which some are taken back: as many as were not right, row by row."""
        assert self.caches is not None
        new = [[self.draw.randrange(self.model.vocabulary) for _ in range(SLACK)] for _ in self.tokens]
        self.caches.mark()
        self.call(self.caches, self.tokens, new)
        counts = [self.draw.randint(0, SLACK) for _ in self.tokens]
        self.caches.keep(mx.array([SLACK - count for count in counts], dtype=mx.int32))
        self.tokens = [row[: len(row) - count] for row, count in zip(self.tokens, counts, strict=True)]
        if self.draw.random() < 0.5:
            self.decode()  # before the host knows
        self.caches.settle(counts)

    def remove(self) -> None:
        assert self.caches is not None
        gone = self.draw.sample(range(len(self.tokens)), self.draw.randint(1, len(self.tokens)))
        if len(gone) == len(self.tokens):
            self.caches, self.tokens = None, []
            return
        self.tokens = [self.tokens[i] for i in self.caches.remove(gone)]
        assert self.caches.rows == len(self.tokens)

    def keep(self) -> None:
        assert self.caches is not None
        row = self.draw.randrange(len(self.tokens))
        self.kept.append((beginning(self.caches, row, self.draw.randint(1, 20)), list(self.tokens[row])))


def beginning(caches: Caches, row: int, width: int = 512) -> Beginning:
    """All of a row, in pieces of at most `width` tokens."""
    length = caches.length(row)
    pieces = [caches.piece(row, at, min(at + width, length)) for at in range(0, length, width)]
    return Beginning(length, tuple(pieces), caches.state(row))


def follow(rows: Rows, count: int) -> None:
    """Let rows come, go, be cut and be kept, as they are drawn; each has to compute what it computes alone."""
    for _ in range(count):
        steps = [rows.join] if rows.caches is None else [rows.join, rows.decode, rows.decode, rows.remove, rows.keep]
        if rows.caches is not None and rows.layout.trimmable:
            steps += [rows.verify, rows.verify]
        if len(rows.tokens) > 6:
            steps = [rows.remove]
        rows.draw.choice(steps)()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_rows_compute_what_they_compute_alone(loaded: dict[str, LoadedModel], kind: str, seed: int) -> None:
    follow(Rows(loaded[kind], Layout(loaded[kind].model, SLACK), random.Random(seed)), 20)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 12))])
def test_rows_that_are_written_in_place_as_well(
    loaded: dict[str, LoadedModel], in_place: OnHost | OnDevice, kind: str, seed: int
) -> None:
    before = in_place.launches
    follow(Rows(loaded[kind], Layout(loaded[kind].model, SLACK, launch=in_place), random.Random(seed)), 20)
    assert in_place.launches > before


def test_what_was_cut_off_has_left_its_traces_in_a_ring(loaded: dict[str, LoadedModel]) -> None:
    """A ring has `slack` places to spare, and tokens that were taken back have used some of them."""
    model = loaded["gemma3_text"]
    draw = random.Random(0)
    prompt = [draw.randrange(model.vocabulary) for _ in range(60)]
    for length in (28, 60):
        caches = Layout(model.model, SLACK).new()
        caches.call(model.model, mx.array([prompt[:length]]))
        caches.mark()
        caches.call(model.model, mx.array([prompt[:SLACK]]))
        caches.keep(mx.array([1], dtype=mx.int32))
        caches.settle([SLACK - 1])
        kept = beginning(caches, 0)
        assert kept.state is not None
        assert (kept.length, kept.written) == (length + 1, length + SLACK)
        again = Layout(model.model, SLACK).restore([kept])
        assert beginning(again, 0).state is not None, "the traces are still there"
        answer = again.call(model.model, mx.array([[7]]))
        assert close(answer[0, -1], alone(model, [*prompt[:length], prompt[0], 7]))


def test_layouts_say_what_they_can_do(loaded: dict[str, LoadedModel]) -> None:
    assert {kind: (loaded[kind].layout.trimmable, Layout(loaded[kind].model, 4).trimmable) for kind in FAMILIES} == {
        "llama": (True, True),
        "qwen3": (True, True),
        "qwen3_moe": (True, True),
        "gemma3_text": (False, True),
        "lfm2": (False, False),
    }
    assert loaded["lfm2"].layout.recurrent
    assert loaded["gemma3_text"].layout.windows == [24]


def filled(model: LoadedModel, lengths: list[int]) -> Caches:
    caches = model.layout.new(len(lengths))
    prompts = [[(7 * i + j) % model.vocabulary for j in range(max(lengths))] for i in range(len(lengths))]
    caches.call(model.model, mx.array(prompts), lengths)
    mx.eval(caches.arrays)
    return caches


@pytest.mark.parametrize("lengths", [[300] * 4, [300, 40, 7, 299]], ids=["one length", "many lengths"])
def test_a_step_writes_in_place(loaded: dict[str, LoadedModel], lengths: list[int]) -> None:
    model = loaded["llama"]
    caches = filled(model, lengths)
    tokens = mx.array([[5]] * 4)
    mx.eval(caches.call(model.model, tokens))
    before = active_memory()
    mx.reset_peak_memory()
    for _ in range(5):
        mx.eval(caches.call(model.model, tokens))
    assert mx.get_peak_memory() - before < caches.nbytes / 8
    assert caches.layers[0].keys.shape == (4, 2, 512, 16)


def cost(what: Callable[[], object], caches: Caches) -> int:
    """Bytes beside those in use that it takes. What is not read any more by then can be written in place."""
    before = active_memory()
    # A buffer that MLX has kept is in use as a whole, where a smaller one is wanted.
    mx.clear_cache()
    mx.reset_peak_memory()
    what()
    mx.synchronize()
    mx.eval(caches.arrays)
    return mx.get_peak_memory() - before


def test_leaving_copies_one_row_and_not_the_batch(loaded: dict[str, LoadedModel]) -> None:
    caches = filled(loaded["llama"], [100 + i for i in range(16)])
    row = caches.nbytes / 16
    orders: list[list[int]] = []
    assert cost(lambda: orders.append(caches.remove([3])), caches) <= 1.1 * row
    assert orders == [[0, 1, 2, 15, *range(4, 15)]]
    assert cost(lambda: orders.append(caches.remove([1, 14, 5])), caches) <= 2.2 * row


def test_rows_leave_and_are_restored_together(loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, what moves is started once; rows that begin the same are written at once."""
    model = loaded["llama"]
    caches = filled(model, [40 + i for i in range(6)])
    starts: list[object] = []
    started = lambda *trees: (starts.append(trees), mx.async_eval(*trees))  # noqa: E731
    monkeypatch.setattr("runner.engine.kv.caches.start", started)
    piece = caches.piece(0, 0, 30)
    assert sorted(caches.remove([0, 2])) == [1, 3, 4, 5]
    assert len(starts) == 1
    writes: list[int] = []
    paste = Planes.paste

    def counted(planes: Planes, first: int, rows: int, *more: Any) -> None:
        writes.append(rows)
        paste(planes, first, rows, *more)

    monkeypatch.setattr(Planes, "paste", counted)
    same = [Beginning(30, (piece,)), Beginning(30, (piece,)), None, Beginning(20, (piece,))]
    restored = model.layout.restore(same)
    assert writes == [2] * len(restored.layers) + [1] * len(restored.layers)
    for layer in restored.layers:
        keys = layer.keys
        assert mx.array_equal(keys[0, :, :30], keys[1, :, :30]).item()
        assert mx.array_equal(keys[0, :, :20], keys[3, :, :20]).item()
        assert not keys[2].any().item()


def test_joining_copies_the_row_once_there_is_room(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    caches = filled(model, [100 + i for i in range(12)])
    caches.join(filled(model, [90]))
    mx.eval(caches.arrays)
    assert caches.layers[0].keys.shape[0] == 16, "room for more than the one that came"
    row = caches.nbytes / 16
    costs = []
    for length in (80, 70, 60):
        new = filled(model, [length])
        costs.append(cost(lambda new=new: caches.join(new), caches))  # type: ignore[misc]
    assert min(costs) <= 1.1 * row
    assert caches.rows == 16


def test_room_shrinks_with_the_batch(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    caches = filled(model, [520])
    caches.join(filled(model, [20] * 9))
    assert caches.layers[0].keys.shape == (10, 2, 768, 16)
    caches.remove([0, 5, 6, 7, 8, 9, 4])
    mx.eval(caches.arrays)
    assert caches.layers[0].keys.shape == (3, 2, 512, 16)


def test_what_a_row_has_left_behind_does_not_reach_the_next(loaded: dict[str, LoadedModel]) -> None:
    """Not even infinities, from where they are masked."""
    model = loaded["llama"]
    caches = filled(model, [40, 40])
    for leaf in caches.layers:
        leaf.keys = leaf.keys.at[1].add(float("inf"))
    caches.remove([1])
    short = filled(model, [3])
    caches.join(short)
    answers = caches.call(model.model, mx.array([[1], [2]]))
    assert all(to_list(mx.isfinite(answers).all(axis=(1, 2))))


def test_cutting_off_needs_no_wait(loaded: dict[str, LoadedModel]) -> None:
    model = loaded["llama"]
    caches = filled(model, [20, 20])
    caches.mark()
    caches.call(model.model, mx.array([[1, 2, 3], [4, 5, 6]]))
    counts = mx.array([1, 3]) * mx.array([1, 1])
    caches.keep(counts)
    after = caches.call(model.model, mx.array([[9], [9]]))
    caches.settle([2, 0])
    prompts = [[(7 * i + j) % model.vocabulary for j in range(20)] for i in range(2)]
    assert close(after[0, -1], alone(model, [*prompts[0], 1, 9]))
    assert close(after[1, -1], alone(model, [*prompts[1], 4, 5, 6, 9]))
    assert caches.length(0) == 22
