"""What is handled between two steps, and what is not read at all."""

from __future__ import annotations

import random
import threading
import time
from queue import SimpleQueue

import pytest

from runner.engine.arrivals import AT_ONCE, TOGETHER, TOGETHER_SECONDS, Arrivals, Arrived
from runner.engine.prepared import Prepared
from runner.engine.transport import Connected, Disconnected, Event, Woken
from runner.errors import Unavailable
from runner.protocol import Cancel, DropAdapter, Generate
from tests.engine.client import PATIENCE
from tests.engine.drive import generate

READ = Unavailable("any outcome")


def arrivals(*events: Event) -> Arrivals:
    inbox: SimpleQueue[Event] = SimpleQueue()
    for event in events:
        inbox.put(event)
    return Arrivals(inbox)


def taken(of: Arrivals, *, busy: bool = True) -> list[Event]:
    return list(of.take(busy=busy, patience=lambda: 0.0))


def long(number: int) -> Generate:
    return generate(number, prompt="x" * (AT_ONCE // 2 + 1))


def test_short_requests_are_read_together() -> None:
    events = [generate(i, messages=[{"role": "user", "content": "hello"}]) for i in range(1000)]
    assert taken(arrivals(*events)) == events


@pytest.mark.parametrize("busy", [True, False])
def test_a_step_comes_between_long_ones(busy: bool) -> None:
    """In order, and what is left is not waited for: it is there."""
    events = [Connected(1), *map(long, range(5)), DropAdapter("a"), generate(5, prompt=[1, 2])]
    of = arrivals(*events)
    for part in (events[:3], events[3:5], events[5:]):
        assert taken(of, busy=busy) == part
        assert of.waiting == (part != events[5:])
    assert taken(of) == []


@pytest.mark.parametrize("busy", [True, False])
def test_who_comes_while_others_are_read_goes_on_with_them(busy: bool) -> None:
    """Up to some text: a step comes before all of a crowd is read."""
    of = arrivals(generate(0, prompt="x" * (TOGETHER // 4)))
    got = []
    for event in of.take(busy=busy, patience=lambda: 0.0):
        got.append(event)
        of._inbox.put(generate(len(got), prompt="x" * (TOGETHER // 4)))
    assert len(got) == 4


@pytest.mark.parametrize("busy", [True, False])
def test_rows_do_not_wait_for_more_than_was_there_where_there_is_nothing_to_read(busy: bool) -> None:
    of = arrivals(Cancel(1))
    for number, _ in enumerate(of.take(busy=busy, patience=lambda: 0.0)):
        if number < 5:
            of._inbox.put(Cancel(number))
    assert of._inbox.empty() == (not busy)


def test_what_was_cancelled_meanwhile_is_not_read() -> None:
    of = arrivals(long(1), long(2), long(3), Cancel(2), long(4), Cancel(1))
    assert taken(of) == [long(3), Cancel(2), long(4)]
    assert taken(of) == [Cancel(1)]
    assert of.dropped == 2
    assert taken(arrivals(Cancel(3), long(3))) == [Cancel(3), long(3)], "another's, from before"


def test_requests_of_a_runner_that_is_gone_are_not_read() -> None:
    of = arrivals(long(1), Disconnected(1), Connected(2), long(1), Cancel(7))
    assert taken(of) == [Disconnected(1), Connected(2), long(1), Cancel(7)]
    assert of.dropped == 1


def read(number: int, prompt: str = "x" * AT_ONCE) -> Prepared:
    return Prepared(generate(number, prompt=prompt), READ)


@pytest.mark.parametrize("busy", [True, False])
def test_what_has_been_read_already_is_taken_at_once_however_long(busy: bool) -> None:
    events = [*map(read, range(5)), DropAdapter("a")]
    of = arrivals(*events)
    assert taken(of, busy=busy) == events
    assert not of.waiting


def test_what_was_cancelled_after_it_was_read_is_not_taken() -> None:
    of = arrivals(read(1), read(2), Cancel(1), Disconnected(1), read(3))
    assert taken(of) == [Cancel(1), Disconnected(1), read(3)]
    assert of.dropped == 2


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[Arrived]:
    """A queue in which one request is, while another is being read; it is patient."""
    monkeypatch.setattr("runner.engine.arrivals.TOGETHER_SECONDS", PATIENCE)
    inbox: SimpleQueue[Arrived] = SimpleQueue()
    inbox.put(read(0))
    return inbox


def test_who_comes_with_others_is_waited_for_where_there_is_nothing_else_to_do(unread: SimpleQueue[Arrived]) -> None:
    of = Arrivals(unread, unread=lambda: more.is_alive())
    more = threading.Timer(0.02, unread.put, (read(1),))
    more.start()
    assert of.waiting
    assert taken(of, busy=False) == [read(0), read(1)]
    more.join()
    assert not of.waiting


def test_nobody_is_waited_for_where_rows_are_or_nothing_is_being_read(unread: SimpleQueue[Arrived]) -> None:
    began = time.monotonic()
    assert taken(Arrivals(unread, lambda: True), busy=True) == [read(0)]
    unread.put(read(0))
    assert taken(Arrivals(unread, lambda: False), busy=False) == [read(0)]
    assert time.monotonic() < began + PATIENCE


def test_a_long_text_that_is_being_read_is_waited_for_a_moment_only() -> None:
    inbox: SimpleQueue[Arrived] = SimpleQueue()
    inbox.put(read(0))
    of = Arrivals(inbox, lambda: True)
    began = time.monotonic()
    assert taken(of, busy=False) == [read(0)]
    assert TOGETHER_SECONDS <= time.monotonic() - began < PATIENCE
    inbox.put(read(1))
    assert taken(of) == [read(1)]


@pytest.mark.parametrize("event", [Woken(), Cancel(9), Connected(1), DropAdapter("a")])
def test_what_is_no_request_is_not_held_up_by_what_is_being_read(unread: SimpleQueue[Arrived], event: Event) -> None:
    unread.get()
    unread.put(event)
    began = time.monotonic()
    assert taken(Arrivals(unread, lambda: True), busy=False) == [event]
    assert time.monotonic() < began + PATIENCE


def test_one_after_the_other_is_waited_for_and_what_was_cancelled_is_dropped() -> None:
    of = arrivals(long(1), DropAdapter("a"), long(2), Cancel(1), Cancel(2))

    def following() -> Arrived:
        of.wait()
        return of.pop()

    assert following() == DropAdapter("a")
    of._inbox.put(Cancel(3))
    threading.Timer(0.02, of._inbox.put, (long(4),)).start()
    assert [following() for _ in range(4)] == [Cancel(1), Cancel(2), Cancel(3), long(4)]
    assert of.dropped == 2


def test_nothing_else_is_lost_or_changes_places() -> None:
    chance = random.Random(3)
    made: list[Event] = []
    for i in range(500):
        pick = chance.random()
        made.append(long(i) if pick < 0.5 else DropAdapter(str(i)) if pick < 0.8 else Cancel(chance.randrange(i + 1)))
    of = arrivals(*made)
    got: list[Event] = []
    while some := taken(of):
        got += some
    left = [event for event in made if event in got]
    assert got == left
    lost = [event for event in made if event not in got]
    assert len(lost) == of.dropped
    assert all(isinstance(event, Generate) and Cancel(event.id) in made for event in lost)
