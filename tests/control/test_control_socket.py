import asyncio
import contextlib
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runner.control import client
from runner.control.control_socket import ControlSocket
from runner.errors import ControlError, Diagnostic, ListenerError, ManifestError, NotRunning


async def count(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for number in range(request["to"]):
        yield {"event": "number", "number": number}
    yield {"done": True}


async def broken_manifest(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"event": "started"}
    raise ManifestError([Diagnostic("dev.yaml", 3, 5, "models.chat", "is wrong", "mend it")])


async def needs_a_field(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"field": int(request["field"])}


async def port_taken(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    raise ListenerError("port 8080 is taken", hint="use another")
    yield {}


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    server = ControlSocket(
        tmp_path / "c", {"count": count, "broken": broken_manifest, "taken": port_taken, "field": needs_a_field}
    )
    await server.start()
    yield tmp_path / "c"
    await server.close()
    assert not (tmp_path / "c").exists()


async def test_answers_line_by_line(path: Path) -> None:
    replies = await asyncio.to_thread(lambda: list(client.stream(path, "count", to=3)))
    assert [r.get("number") for r in replies] == [0, 1, 2, None]
    assert replies[-1] == {"done": True}


async def test_only_the_owner_may_connect(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_errors_come_back_as_what_they_were(path: Path) -> None:
    with pytest.raises(ManifestError) as manifest:
        await asyncio.to_thread(client.request, path, "broken")
    assert manifest.value.diagnostics[0].line == 3
    with pytest.raises(ControlError, match="port 8080 is taken\nuse another"):
        await asyncio.to_thread(client.request, path, "taken")


async def test_what_is_not_a_request_is_refused(path: Path) -> None:
    with pytest.raises(ControlError, match="`op` is one of count, broken, taken, field"):
        await asyncio.to_thread(client.request, path, "nonsense")


@pytest.mark.parametrize("request_line", [b"[" * 200_000, b'{"op": []}', b'["op"]', b"\xff", b"x" * 2**21, b""])
async def test_rubbish_is_answered_too(path: Path, request_line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request_line + b"\n")
    async with asyncio.timeout(15):
        assert b"`op` is one of" in await reader.readline()
    writer.close()


async def test_a_fault_of_ours_is_answered(path: Path) -> None:
    with pytest.raises(ControlError, match="OverflowError"):
        await asyncio.to_thread(client.request, path, "field", field=float("inf"))


async def test_a_line_that_was_cut_with_its_writer_is_no_answer(tmp_path: Path) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"done": tr')
        writer.close()

    async with await asyncio.start_unix_server(half, str(tmp_path / "c")):
        with pytest.raises(NotRunning, match="in the middle of its answer"):
            await asyncio.to_thread(client.request, tmp_path / "c", "status")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it looks as if nobody were there")
def test_one_that_takes_no_connections_is_not_asked_for_ever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as waiting:
        listening.bind(str(tmp_path / "c"))
        listening.listen(1)
        for _ in range(2):
            waiting.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "c"))
        with pytest.raises(NotRunning, match="does not answer"):
            client.request(tmp_path / "c", "status", timeout=0.1)


async def test_a_dead_ones_socket_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))  # as after kill -9: the file stays
    assert not client.is_up(tmp_path / "s")
    fresh = ControlSocket(tmp_path / "s", {"count": count})
    await fresh.start()
    assert await asyncio.to_thread(client.request, tmp_path / "s", "count", to=0) == {"done": True}
    await fresh.close()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="mlx-run apply"):
        client.request(tmp_path / "none", "status")


async def test_a_request_without_its_field_is_answered(path: Path) -> None:
    with pytest.raises(ControlError, match="'field' failed"):
        await asyncio.to_thread(client.request, path, "field")


async def test_a_feed_ends_when_its_client_hangs_up_and_work_does_not(tmp_path: Path) -> None:
    happened: list[str] = []
    begun = asyncio.Event()

    async def endless(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            yield {"event": "first"}
            await asyncio.Event().wait()
        finally:
            happened.append("feed ended")

    async def work(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        begun.set()
        await asyncio.sleep(0.05)
        happened.append("work done")
        yield {"done": True}

    server = ControlSocket(tmp_path / "c", {"feed": endless, "work": work}, feeds=frozenset({"feed"}))
    await server.start()
    reader, writer = await asyncio.open_unix_connection(tmp_path / "c")
    writer.write(b'{"op": "feed"}\n')
    assert b"first" in await reader.readline()
    writer.close()
    async with asyncio.timeout(20):
        while happened != ["feed ended"] or server._answering:
            await asyncio.sleep(0.005)
    _, writer = await asyncio.open_unix_connection(tmp_path / "c")
    writer.write(b'{"op": "work"}\n')
    await begun.wait()
    writer.close()
    async with asyncio.timeout(20):
        while happened != ["feed ended", "work done"]:
            await asyncio.sleep(0.005)
    await server.close()


async def test_a_client_that_says_more_than_asked_is_heard_out(path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b'{"op": "count", "to": 2}\nand more\n')
    assert [await reader.readline() for _ in range(3)][-1] == b'{"done": true}\n'
    writer.close()
