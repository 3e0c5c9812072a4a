"""Requests read by a thread of their own: in order, none that nobody waits for, and none that ends the thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from runner.engine.arrivals import Arrivals, Arrived
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel
from runner.engine.prepared import Prepared
from runner.engine.reading import Reading
from runner.engine.transport import Connected, Disconnected, Event
from runner.errors import Unavailable
from runner.protocol import Cancel, Configure, DropAdapter, Generate, Shutdown
from tests.engine.client import PATIENCE
from tests.engine.drive import Driver, generate


class Stub:
    """Stands for an intake. It reads nothing while `held`."""

    def __init__(self) -> None:
        self.full_at = 1 << 30
        self.read: list[tuple[int, int]] = []
        """Of each request that was read: its id, and the context that it was given."""
        self.reads = threading.Semaphore(0)
        """Released once for each request whose reading begins."""
        self.free = threading.Event()
        self.fails: dict[int, BaseException] = {}

    def refusal(self, request: Generate, limits: Limits) -> Unavailable | None:
        return Unavailable("full") if len(self.read) >= self.full_at else None

    def prepare(self, request: Generate, limits: Limits) -> Prepared:
        self.reads.release()
        assert self.free.wait(PATIENCE)
        if request.id in self.fails:
            raise self.fails[request.id]
        self.read.append((request.id, limits.max_context))
        return Prepared(request, Unavailable("read"))


class Bench:
    """A reading thread, and what goes in and out."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Event] = SimpleQueue()
        self.intake = Stub()
        self.reading = Reading(self.inbox)

    def put(self, *events: Event) -> None:
        for event in events:
            self.inbox.put(event)

    def start(self, *, held: bool = False) -> None:
        if not held:
            self.intake.free.set()
        self.reading.start(self.intake, Limits())

    def until_it_reads(self) -> None:
        assert self.intake.reads.acquire(timeout=PATIENCE)

    def get(self, number: int) -> list[Any]:
        """So many of what comes out; requests that were read as their ids."""
        got = [self.reading.events.get(timeout=PATIENCE) for _ in range(number)]
        return [event.id if isinstance(event, Prepared) else event for event in got]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.intake.free.set()
    made.reading.close(PATIENCE)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ask(request_id: int) -> Generate:
    return generate(request_id, prompt="hello")


def test_everything_keeps_its_place(bench: Bench) -> None:
    others = [Connected(1), DropAdapter("a"), Configure(max_rows=2), Cancel(77), Shutdown(1.0)]
    bench.put(others[0], ask(1), others[1], ask(2), ask(3), others[2], others[3], others[4], ask(4))
    bench.start()
    assert bench.get(9) == [others[0], 1, others[1], 2, 3, *others[2:], 4]
    assert bench.reading.dropped == 0


def test_limits_apply_to_what_comes_after_them(bench: Bench) -> None:
    """Though the engine's own have not changed yet."""
    bench.put(ask(1), Configure(max_context=7), ask(2), Configure(max_rows=3), ask(3))
    bench.start()
    bench.get(5)
    assert bench.intake.read == [(1, 0), (2, 7), (3, 7)]


@pytest.mark.parametrize("end", [Cancel(2), Disconnected(1)])
def test_what_ends_while_another_is_read_is_not_read(bench: Bench, end: Event) -> None:
    bench.put(ask(1))
    bench.start(held=True)
    bench.until_it_reads()
    bench.put(DropAdapter("a"), ask(2), end, ask(3))
    bench.intake.free.set()
    assert bench.get(4) == [1, DropAdapter("a"), end, 3]
    assert [request for request, _ in bench.intake.read] == [1, 3]
    assert bench.reading.dropped == 1


def test_a_cancel_between_reading_and_taking_is_seen_by_whoever_takes(bench: Bench) -> None:
    bench.put(ask(1), ask(2))
    bench.start()
    until(lambda: bench.reading.events.qsize() == 2)
    bench.put(Cancel(1))
    until(lambda: bench.reading.events.qsize() == 3)
    arrivals = Arrivals(bench.reading.events, bench.reading.behind)
    taken = list(arrivals.take(busy=True, patience=lambda: 0.0))
    assert [getattr(event, "id", None) for event in taken] == [2, 1]
    assert isinstance(taken[1], Cancel)
    assert arrivals.dropped == 1


def test_what_is_not_handed_on_yet_is_known(bench: Bench) -> None:
    assert not bench.reading.behind()
    bench.put(ask(1))
    assert bench.reading.behind(), "nobody has looked yet"
    bench.start(held=True)
    bench.until_it_reads()
    assert bench.inbox.empty()
    assert bench.reading.behind(), "it is being read"
    bench.put(ask(2), DropAdapter("a"))
    bench.intake.free.set()
    assert bench.get(3) == [1, 2, DropAdapter("a")]
    until(lambda: not bench.reading.behind())


def test_what_the_engine_would_refuse_is_handed_on_unread(bench: Bench) -> None:
    bench.intake.full_at = 3
    bench.put(*map(ask, range(5)))
    bench.start()
    until(lambda: bench.reading.events.qsize() == 5)
    assert [request for request, _ in bench.intake.read] == [0, 1, 2]
    assert bench.get(5) == [0, 1, 2, ask(3), ask(4)]


@pytest.mark.parametrize("error", [ValueError("odd"), BaseException("a panic"), SystemExit(2)])
def test_what_ends_the_reading_of_one_does_not_end_that_of_others(
    bench: Bench, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It is handed on as it came: who reads it again has to tell of it."""
    bench.intake.fails = {1: error}
    bench.put(ask(1), ask(2))
    bench.start()
    assert bench.get(2) == [ask(1), 2]
    assert type(error).__name__ in caplog.text


def test_a_panic_of_the_tokenizer_is_the_end_of_one_request(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no Exception; who wants the process to end is heard."""

    class Panic(BaseException):
        pass

    def encode(*_: object) -> list[int]:
        raise Panic("index out of bounds")

    driver = Driver(llama)
    monkeypatch.setattr("runner.engine.tokenizer.Tokenizer.encode_prompt", encode)
    driver.engine.submit(ask(1))
    rejected = driver.answers[1].rejected
    assert rejected is not None
    assert rejected.status == 500
    assert "Panic: index out of bounds" in rejected.reason
    assert "in encode" in caplog.text, "where it was"
    monkeypatch.setattr("runner.engine.tokenizer.Tokenizer.encode_prompt", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        driver.engine.submit(ask(2))


def test_closing_waits_for_what_is_being_read_and_reads_no_more(bench: Bench) -> None:
    bench.put(ask(1), ask(2))
    bench.start(held=True)
    bench.until_it_reads()
    threading.Timer(0.05, bench.intake.free.set).start()
    bench.reading.close(PATIENCE)
    assert bench.reading._thread is not None
    assert not bench.reading._thread.is_alive()
    assert [request for request, _ in bench.intake.read] == [1]


def test_a_thread_that_was_never_started_is_not_waited_for() -> None:
    Reading(SimpleQueue()).close(PATIENCE)


# ------------------------------------------------------------- with an engine


def both(loaded: LoadedModel, act: Callable[[Driver, Callable[[Arrived], None]], None]) -> list[Any]:
    """What an engine says where each request is submitted, and where it is read by another thread and taken."""
    said = []
    for apart in (False, True):
        driver = Driver(loaded, max_queue=2)
        if not apart:
            act(driver, driver.engine.submit)
        else:
            inbox: SimpleQueue[Event] = SimpleQueue()
            reading = Reading(inbox)
            reading.start(driver.engine.intake, driver.engine.limits)

            def take(request: Generate, *, driver: Driver = driver, reading: Reading = reading) -> None:
                reading._inbox.put(request)
                event = reading.events.get(timeout=PATIENCE)
                (driver.engine.take if isinstance(event, Prepared) else driver.engine.submit)(event)

            act(driver, take)
            reading.close(PATIENCE)
        driver.drain()
        said.append([(answer.text, answer.usage, answer.rejected) for _, answer in sorted(driver.answers.items())])
    assert said[0] == said[1]
    return said[0]


def test_an_engine_says_the_same_of_what_another_thread_has_read(llama: LoadedModel) -> None:
    def act(driver: Driver, give: Callable[[Generate], None]) -> None:
        messages = [{"role": "user", "content": "hello"}]
        give(generate(0, messages=messages, max_tokens=5))
        give(generate(1, messages=messages, count_only=True))
        give(generate(2, prompt=[]))
        give(generate(3, prompt="a", adapter="none"))
        give(generate(4, prompt="a", top_k=3, max_tokens=5, seed=4, temperature=1.0))
        give(generate(5, prompt="a"))  # the queue has two
        give(generate(6, prompt=[]))
        driver.drain()
        driver.engine.intake.draining = True
        give(generate(7, prompt=[]))
        give(generate(8, messages=messages, count_only=True))

    said = both(llama, act)
    reasons = [None if rejected is None else rejected.code or rejected.param for _, _, rejected in said]
    full, ends = "queue_full", "shutting_down"
    assert reasons == [None, None, "prompt", "adapter_not_found", None, full, full, ends, None]


def test_what_cannot_be_prepared_is_told_by_the_thread_that_takes(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(llama)
    monkeypatch.setattr("runner.engine.tokenizer.Tokenizer.encode_prompt", lambda *_: 1 // 0)
    found: list[Prepared] = []
    thread = threading.Thread(target=lambda: found.append(driver.engine.intake.prepare(ask(1), Limits())))
    thread.start()
    thread.join()
    assert (driver.frames, driver.engine.stats().failed_total) == ([], 0)
    driver.engine.take(found[0])
    rejected = driver.answers[1].rejected
    assert rejected is not None
    assert rejected.status == 500
    assert rejected.reason.startswith("the request could not be prepared: ")
    assert driver.engine.stats().failed_total == 1
    assert "request could not be prepared" in caplog.text


def test_a_full_queue_or_one_that_closes_reads_nothing(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(llama, max_queue=1)
    driver.engine.submit(generate(0, prompt="a", max_tokens=2))
    monkeypatch.setattr("runner.engine.tokenizer.Tokenizer.encode_prompt", lambda *_: pytest.fail("read"))
    driver.engine.submit(ask(1))
    driver.engine.intake.draining = True
    driver.engine.submit(ask(2))
    codes = [driver.answers[i].rejected.code for i in (1, 2)]
    assert codes == ["queue_full", "shutting_down"]
