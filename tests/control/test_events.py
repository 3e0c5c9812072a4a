import asyncio

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


async def test_a_slow_subscriber_loses_the_oldest_and_blocks_nobody() -> None:
    log = EventLog()
    with log.subscribe() as queue:
        for number in range(1500):
            log.emit("tick", number=number)
        assert queue.qsize() == 1000
        assert (await asyncio.wait_for(queue.get(), 1))["number"] == 500
