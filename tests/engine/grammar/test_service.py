"""Rows wait for their grammar beside the queue; grammars are compiled once."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from runner.engine.detokenizer import ByteDetokenizer
from runner.engine.grammar import service as module
from runner.engine.grammar.service import MAX_SOURCE, Grammars
from runner.engine.loader import LoadedModel
from runner.engine.row import Row
from runner.engine.stops import StopStrings
from runner.errors import InvalidRequest, RequestError
from runner.protocol import Grammar, Sampling
from tests.engine.tiny import encode

PATIENCE = 30.0


class Waited:
    """A service and its wake calls."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.woken: SimpleQueue[None] = SimpleQueue()
        self.service = Grammars(loaded.tokenizer, loaded.vocabulary, lambda: self.woken.put(None))
        self._tokenizer = loaded.tokenizer
        assert loaded.tokenizer.bytes_of is not None
        self._bytes = loaded.tokenizer.bytes_of

    def row(self) -> Row:
        return Row(0, [1], Sampling(), 0, 10, frozenset(), ByteDetokenizer(self._bytes), StopStrings(()))

    def take(self, count: int) -> list[tuple[Row, RequestError | None]]:
        """Wait for as many rows."""
        taken: list[tuple[Row, RequestError | None]] = []
        while len(taken) < count:
            self.woken.get(timeout=PATIENCE)
            taken += self.service.take()
        return taken


@pytest.fixture
def waited(llama: LoadedModel) -> Waited:
    return Waited(llama)


def regex(pattern: str) -> Grammar:
    return Grammar("regex", pattern, "field")


def test_the_first_waits_and_the_next_does_not(waited: Waited) -> None:
    rows = [waited.row() for _ in range(4)]
    assert [waited.service.give(row, regex("a+")) for row in rows[:3]] == [False] * 3
    assert waited.service.rows == rows[:3]
    assert waited.take(3) == [(row, None) for row in rows[:3]]
    assert waited.woken.empty(), "one grammar is compiled once"
    assert waited.service.rows == []
    assert waited.service.give(rows[3], regex("a+"))
    for row in rows:
        assert row.grammar is not None
    one, other = rows[0].grammar, rows[3].grammar
    assert one is not None
    assert other is not None
    one.advance(encode("b")[0])
    assert one.error
    assert not other.error, "each row has its own"


def test_a_refusal_is_remembered(waited: Waited) -> None:
    assert not waited.service.give(waited.row(), regex("("))
    ((_, refusal),) = waited.take(1)
    assert isinstance(refusal, InvalidRequest)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="unclosed group") as again:
            waited.service.give(waited.row(), regex("("))
        assert again.value.param == "field"


def test_the_same_text_in_another_field_is_another(waited: Waited) -> None:
    waited.service.give(waited.row(), regex("("))
    waited.take(1)
    assert not waited.service.give(waited.row(), Grammar("regex", "(", "elsewhere"))
    ((_, refusal),) = waited.take(1)
    assert refusal is not None
    assert refusal.param == "elsewhere"


def test_rows_that_left_are_forgotten(waited: Waited) -> None:
    left, stays = waited.row(), waited.row()
    for row in (left, stays):
        waited.service.give(row, regex("b+"))
    left.done = True
    assert waited.service.remove_ended() == [left]
    assert waited.take(1) == [(stays, None)]


def test_too_large(waited: Waited) -> None:
    with pytest.raises(InvalidRequest, match="256 KiB") as refused:
        waited.service.give(waited.row(), regex("a" * (MAX_SOURCE + 1)))
    assert refused.value.code == "too_large"
    assert waited.service.rows == []


def test_old_ones_are_forgotten(waited: Waited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)
    for pattern in ("a", "b", "a", "c"):
        if not waited.service.give(waited.row(), regex(pattern)):
            waited.take(1)
    assert [waited.service.give(waited.row(), regex(pattern)) for pattern in "ac"] == [True, True]
    assert not waited.service.give(waited.row(), regex("b")), "it was used least recently"
    waited.take(1)


def test_the_thread_ends_when_idle_and_starts_again(waited: Waited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.0)
    for pattern in ("x", "y", "z"):
        assert not waited.service.give(waited.row(), regex(pattern))
        assert [refusal for _, refusal in waited.take(1)] == [None]
