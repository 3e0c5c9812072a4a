import asyncio
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import pytest
from msgspec.structs import replace

from runner.cli.main import main
from runner.cli.status import frame
from tests.control.scene import Scene
from tests.gateway.test_system import STATS


@contextmanager
def terminal() -> Iterator[int]:
    """Standard output is a terminal meanwhile; what is drawn can be read from the descriptor."""
    reading, writing = os.openpty()
    with os.fdopen(writing, "w") as stdout, redirect_stdout(stdout):
        yield reading
    os.close(reading)


def read_until(terminal: int, text: str) -> str:
    """What a terminal got, up to where `text` is in it."""
    got = b""
    while text.encode() not in got:
        readable, _, _ = select.select([terminal], [], [], 15)
        assert readable, f"{text!r} was not drawn; there is {got!r}"
        got += os.read(terminal, 65536)
    return got.decode()


async def test_watching_draws_each_change_and_ends_with_the_runner(up: Scene) -> None:
    assert up.runner is not None
    with terminal() as drawn:
        watching = asyncio.create_task(asyncio.to_thread(main, ["status", "--watch"]))
        first = await asyncio.to_thread(read_until, drawn, "0 running")
        assert first.startswith("\x1b[?1049h")
        assert "generation 1" in first
        up.write("chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate}}")
        assert "generation 2" in await asyncio.to_thread(read_until, drawn, "adapters: pirate")
        up.runner._stop.set()
        last = await asyncio.to_thread(read_until, drawn, "dev: stopped.")
        assert "\x1b[?25h\x1b[?1049l" in last, "the cursor and the screen are given back"
        assert await watching == 0


async def test_a_draft_is_shown_and_how_it_does(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    up.model("small")
    up.write("chat: {source: ./models/chat, draft: {source: ./models/small}}")
    await up.event("applied", 2)
    assert await asyncio.to_thread(main, ["status"]) == 0
    assert "    draft: ./models/small\n" in capsys.readouterr().out
    up.live.deployments["chat"].engine.stats = replace(STATS, drafted_tokens_total=4000, accepted_tokens_total=3000)
    assert await asyncio.to_thread(main, ["status", "--verbose"]) == 0
    assert "    draft: ./models/small, 75% of 4,000 proposed tokens accepted\n" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_watching_needs_a_terminal(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", *extra]) == 64
    assert "mlx-run events -f --json" in capsys.readouterr().err


def test_a_frame_fits_the_terminal() -> None:
    drawn = frame("12345678\n\nb\nc", os.terminal_size((6, 4)))
    assert drawn == "\x1b[H12345\x1b[K\n678\x1b[K\n\x1b[K\nb\x1b[K\x1b[J"


def test_a_terminal_that_does_not_know_its_size() -> None:
    assert frame("a", os.terminal_size((0, 0))) == "\x1b[Ha\x1b[K\x1b[J"
