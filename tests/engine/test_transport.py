"""The socket's two queues: what belongs to which runner, and runners that do not behave."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from runner.engine import environment
from runner.engine import transport as transport_module
from runner.engine.transport import Connected, Disconnected, Transport, Woken
from runner.protocol import Cancel, Delta, FromEngine, Hello, Loading, Step, Usage, decoder_from_engine, encode_frame
from tests.engine.client import PATIENCE, Client

HELLO = Hello(1, 1, "m", "d", False)


def step(text: str) -> Step:
    return Step([Delta(1, text, 1)])


def awaited(text: str) -> Step:
    """One with which an answer begins, among others that go on."""
    return Step([Delta(1, text, 1), Delta(2, text, 1, usage=Usage(3, 1))])


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Transport]:
    made = Transport(tmp_path / "e.sock")
    made.start(HELLO)
    yield made
    made.close(PATIENCE)


@pytest.fixture
def connect(transport: Transport, tmp_path: Path) -> Iterator[Callable[[], Client]]:
    clients = []

    def begin() -> Client:
        clients.append(Client(tmp_path / "e.sock"))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()


def test_greets_then_carries_both_ways(transport: Transport, connect: Callable[[], Client]) -> None:
    client = connect()
    assert client.wait(Hello) == HELLO
    event = transport.inbox.get(timeout=PATIENCE)
    assert isinstance(event, Connected)
    transport.answer(event.connection)
    client.send(Cancel(5), Cancel(6))
    assert transport.inbox.get(timeout=PATIENCE) == Cancel(5)
    assert transport.inbox.get(timeout=PATIENCE) == Cancel(6)
    transport.send(step("x"))
    assert client.wait(Step) == step("x")
    client.close()
    assert transport.inbox.get(timeout=PATIENCE) == Disconnected(event.connection)


def test_what_was_meant_for_an_older_runner_does_not_reach_the_newer(
    transport: Transport, connect: Callable[[], Client]
) -> None:
    connect().wait(Hello)
    first = transport.inbox.get(timeout=PATIENCE)
    assert isinstance(first, Connected)
    transport.answer(first.connection)
    newer = connect()
    newer.wait(Hello)
    assert transport.inbox.get(timeout=PATIENCE) == Disconnected(first.connection)
    # The main thread has not taken the next event yet: what it computes is still the older runner's.
    transport.send(step("old"))
    second = transport.inbox.get(timeout=PATIENCE)
    assert isinstance(second, Connected)
    transport.answer(second.connection)
    transport.send(step("new"))
    assert newer.wait(Step) == step("new")


def test_each_runner_learns_a_stage_once(transport: Transport, connect: Callable[[], Client]) -> None:
    early = connect()
    early.wait(Hello)
    transport.announce(Loading("weights"), HELLO, Loading("weights"))
    early.wait(Loading, stage="weights")
    late = connect()
    late.wait(Loading, stage="weights")
    transport.announce(Loading("warmup"), HELLO, Loading("warmup"))
    late.wait(Loading, stage="warmup")
    assert [type(frame) for frame in late.frames] == [Hello, Loading, Loading]


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", encode_frame(HELLO)])
def test_garbage_is_the_end_of_a_connection(
    transport: Transport, connect: Callable[[], Client], garbage: bytes
) -> None:
    client = connect()
    client.socket.sendall(garbage)
    client.until_closed()
    assert isinstance(transport.inbox.get(timeout=PATIENCE), Connected)
    assert isinstance(transport.inbox.get(timeout=PATIENCE), Disconnected)
    connect().wait(Hello)


def test_a_runner_that_does_not_read_is_disconnected(
    transport: Transport, connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "MAX_UNSENT", 4_000_000)
    client = connect()
    event = transport.inbox.get(timeout=PATIENCE)
    assert isinstance(event, Connected)
    transport.answer(event.connection)
    for _ in range(50):
        transport.send(step("x" * 200_000))
    assert transport.inbox.get(timeout=PATIENCE) == Disconnected(event.connection)
    client.until_closed()


def test_where_an_answer_begins_or_ends_the_frame_is_in_the_socket_when_send_returns(
    transport: Transport, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as runner:
        runner.connect(str(tmp_path / "e.sock"))
        event = transport.inbox.get(timeout=PATIENCE)
        assert isinstance(event, Connected)
        transport.answer(event.connection)
        assert runner.recv(4096) == encode_frame(HELLO)
        deadline = time.monotonic() + PATIENCE
        while transport._unsent:  # the writer has written the greeting, and is about to say so
            assert time.monotonic() < deadline
        for text in ("a", "b"):
            transport.send(awaited(text))
            assert runner.recv(4096, socket.MSG_DONTWAIT) == encode_frame(awaited(text))


@pytest.mark.parametrize(("cores", "written"), [(2, 0), (3, 0), (4, 2), (64, 2)])
def test_the_main_thread_writes_all_frames_where_the_runner_has_cores_of_its_own(
    cores: int, written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: cores)
    frames: list[bytes] = []
    write_now = Transport._write_now

    def recorded(self: Transport, connection: int, frame: bytes) -> bytes:
        frames.append(frame)
        return write_now(self, connection, frame)

    monkeypatch.setattr(Transport, "_write_now", recorded)
    made = Transport(tmp_path / "w.sock")
    made.start()
    client = Client(tmp_path / "w.sock")
    event = made.inbox.get(timeout=PATIENCE)
    assert isinstance(event, Connected)
    made.answer(event.connection)
    for text in ("a", "b"):
        made.send(step(text))
    client.until(lambda: len(client.frames) == 2)
    made.close(PATIENCE)
    client.close()
    assert client.frames == [step("a"), step("b")]
    assert len(frames) == written


@pytest.mark.parametrize("cores", [2, 4])
def test_frames_stay_in_order_when_the_socket_is_full(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: cores)
    transport: Transport = request.getfixturevalue("transport")
    with socket.socket(socket.AF_UNIX) as runner:
        runner.settimeout(PATIENCE)
        runner.connect(str(tmp_path / "e.sock"))
        event = transport.inbox.get(timeout=PATIENCE)
        assert isinstance(event, Connected)
        transport.answer(event.connection)
        frames = [(awaited, step)[number % 3 > 0](str(number) * 4000) for number in range(100, 400)]
        for frame in frames:
            transport.send(frame)
        decoder = decoder_from_engine()
        found: list[FromEngine] = []
        while len(found) < 1 + len(frames):
            found += decoder.feed(runner.recv(50_000))
            if len(found) % 3 == 0 and len(frames) < 400:  # while some are still queued
                frames.append((awaited, step)[len(frames) % 2](f"more {len(frames)}"))
                transport.send(frames[-1])
        assert found == [HELLO, *frames]


def test_closing_sends_what_is_queued(tmp_path: Path) -> None:
    made = Transport(tmp_path / "c.sock")
    made.start()
    client = Client(tmp_path / "c.sock")
    event = made.inbox.get(timeout=PATIENCE)
    assert isinstance(event, Connected)
    made.answer(event.connection)
    frames: list[FromEngine] = [step(str(i)) for i in range(100)]
    for frame in frames:
        made.send(frame)
    made.close(PATIENCE)
    client.until(lambda: len(client.frames) == 100)
    assert client.frames == frames
    assert not (tmp_path / "c.sock").exists()
    client.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Transport(tmp_path / "nowhere" / "e.sock")


def test_a_signal_wakes_whoever_waits_for_the_queue_that_was_named(transport: Transport) -> None:
    """Which is not `inbox`, where another thread gets from that."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    waits: SimpleQueue[object] = SimpleQueue()
    try:
        transport.wake_on_signals(waits)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert waits.get(timeout=PATIENCE) == Woken()
        assert transport.inbox.empty()
    finally:
        signal.signal(signal.SIGUSR1, before)
