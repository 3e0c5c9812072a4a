import asyncio
from itertools import pairwise

import pytest

from runner.control.events import EventLog


async def test_a_subscriber_gets_what_happens_from_now_on() -> None:
    log = EventLog()
    log.emit("early")
    with log.subscribe() as queue:
        log.emit("late", target="models.chat")
        event = queue.get_nowait()
    log.emit("after")
    assert event["event"] == "late"
    assert event["target"] == "models.chat"
    assert queue.empty()
    assert [e["event"] for e in log.recent] == ["early", "late", "after"]


def test_any_field_can_be_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log = EventLog()
    log.emit("condition", message="text", name="a name", target="models.chat")
    assert log.recent[0]["message"] == "text"
    (record,) = caplog.records
    assert vars(record)["event_message"] == "text"
    assert vars(record)["target"] == "models.chat"


async def test_a_slow_subscriber_loses_the_oldest_and_blocks_nobody() -> None:
    log = EventLog()
    with log.subscribe() as queue:
        for number in range(1500):
            log.emit("tick", number=number)
        assert queue.qsize() == 1000
        assert (await asyncio.wait_for(queue.get(), 15))["number"] == 500


async def names(log: EventLog, *, follow: bool) -> list[str]:
    return [event["event"] async for event in log.history(follow=follow)]


async def test_history_is_what_was_and_when_followed_what_comes() -> None:
    log = EventLog()
    log.emit("one")
    assert await names(log, follow=False) == ["one"]
    following = asyncio.create_task(names(log, follow=True))
    await asyncio.sleep(0)
    log.emit("two")
    log.emit("stopped")
    assert await asyncio.wait_for(following, 15) == ["one", "two", "stopped"]


async def test_a_burst_is_one_change_and_the_end_is_none() -> None:
    log = EventLog()
    changes = log.changes(gap=0.01)
    await anext(changes)
    log.emit("one")
    log.emit("two")
    await asyncio.wait_for(anext(changes), 15)
    waiting = asyncio.create_task(anext(changes, "ended"))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done, "nothing has happened since"
    log.emit("three")
    log.emit("stopped")
    assert await asyncio.wait_for(waiting, 15) == "ended"
    assert not log._subscribers


async def test_changes_are_never_closer_than_the_gap() -> None:
    log = EventLog()
    loop = asyncio.get_running_loop()
    changes = log.changes(gap=0.05)
    at = []
    for _ in range(4):
        await asyncio.wait_for(anext(changes), 15)
        at.append(loop.time())
        log.emit("again")
    assert all(later - earlier >= 0.049 for earlier, later in pairwise(at))


async def test_without_events_there_is_the_beat_and_an_end() -> None:
    log = EventLog()
    began = asyncio.get_running_loop().time()
    assert len([None async for _ in log.changes(gap=0.0, within=0.05)]) == 2, "at once, and at the end"
    assert asyncio.get_running_loop().time() - began >= 0.05
    beating = log.changes(gap=0.0, beat=0.02)
    for _ in range(4):
        await asyncio.wait_for(anext(beating), 15)
    assert len([None async for _ in log.changes(within=0)]) == 1


def test_an_observer_that_fails_keeps_nothing_from_going_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: dict[str, object]) -> None:
        raise KeyError(event["event"])

    log = EventLog(broken)
    with log.subscribe() as queue:
        log.emit("applied")
    assert queue.get_nowait()["event"] == log.recent[0]["event"] == "applied"
    assert "could not be shown" in caplog.text
