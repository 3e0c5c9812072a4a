import asyncio
from array import array

import msgspec
import pytest

from runner.bench.clients import Clients, encode_request
from runner.bench.figures import level_of
from runner.bench.job import Job, Load, Outcome, Target
from runner.bench.prompts import answer_tokens, request_fields
from tests.bench.server import USAGE, Exchange, ScriptedServer, sse, text, three_tokens


async def run(server: ScriptedServer, **job: object) -> list[Outcome]:
    report = await Clients(server.job(**job)).run()  # type: ignore[arg-type]
    return sorted(report.outcomes, key=lambda o: o.index)


async def one(server: ScriptedServer, **job: object) -> Outcome:
    (outcome,) = await run(server, **job)
    return outcome


async def test_a_stream_is_timed_and_counted(server: ScriptedServer) -> None:
    report = await Clients(server.job()).run()
    (outcome,) = report.outcomes
    assert (outcome.error, outcome.chunks, outcome.finish_reason, outcome.streamed) == ("", 3, "length", True)
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens) == (20, 3, 5)
    assert outcome.ttft is not None
    assert 0 < outcome.ttft <= outcome.ended - outcome.began
    gaps = array("d")
    gaps.frombytes(report.gaps)
    assert len(gaps) == 2
    assert all(gap >= 0 for gap in gaps)


async def test_time_to_first_token_is_that_of_the_first_content(server: ScriptedServer) -> None:
    async def late(exchange: Exchange) -> None:
        exchange.head(200, "text/event-stream", "Transfer-Encoding: chunked")
        exchange.chunk(sse(text("")))  # the role comes at once, and is no token
        await exchange.writer.drain()
        await asyncio.sleep(0.05)
        exchange.chunk(sse(text("a", "stop")) + b"data: [DONE]\n\n")
        exchange.chunk(b"")

    server.behaviour = late
    outcome = await one(server)
    assert outcome.ttft is not None
    assert outcome.ttft >= 0.05


async def test_clients_ask_again_when_their_answer_has_ended_and_keep_their_connection(server: ScriptedServer) -> None:
    outcomes = await run(server, clients=3, requests=12)
    assert [o.index for o in outcomes] == list(range(12))
    assert not any(o.error for o in outcomes)
    assert server.connections == 3
    assert server.most <= 3


async def test_prompts_are_distinct_and_the_same_for_a_seed(server: ScriptedServer) -> None:
    await run(server, requests=5, seed=7)
    await run(server, requests=5, seed=7)
    await run(server, requests=5, seed=8)
    prompts = [e.body["messages"][0]["content"] for e in server.requests]
    assert len(set(prompts[:5])) == 5
    assert prompts[:5] == prompts[5:10]
    assert not set(prompts[:5]) & set(prompts[10:])
    beginnings = [p.split()[:3] for p in prompts[:5]]
    assert all(beginnings.count(b) == 1 for b in beginnings), "no two share a prefix worth caching"


async def test_a_shared_prefix_is_the_same_for_all(server: ScriptedServer) -> None:
    await run(server, requests=3, words=4, shared_words=6)
    words = [e.body["messages"][0]["content"].split() for e in server.requests]
    assert words[0][:6] == words[1][:6] == words[2][:6]
    assert len({tuple(w[6:10]) for w in words}) == 3


async def test_adapters_take_turns(server: ScriptedServer) -> None:
    await run(server, requests=4, adapters=("", "pirate"), adapter_field="adapter_name")
    assert [e.body.get("adapter_name") for e in server.requests] == [None, "pirate", None, "pirate"]


async def test_requests_say_what_was_asked_for(server: ScriptedServer) -> None:
    await run(server, body={"temperature": 0.7, "logit_bias": {"1": -100}}, max_tokens=9)
    body = server.requests[0].body
    assert body["model"] == "m"
    assert (body["stream"], body["max_tokens"], body["temperature"]) == (True, 9, 0.7)
    assert body["logit_bias"] == {"1": -100}
    assert body["stream_options"] == {"include_usage": True}


def test_answers_lengths_differ_by_what_was_asked_for() -> None:
    load = Load(words=3, max_tokens=100, spread=0.25, seed=3)
    lengths = [answer_tokens(load, index) for index in range(200)]
    assert lengths == [answer_tokens(load, index) for index in range(200)], "the same for a seed"
    assert {75 <= length <= 125 for length in lengths} == {True}
    assert max(lengths) - min(lengths) > 40
    fields = request_fields(load, 7, model="", usage=False)
    assert fields["max_tokens"] == lengths[7]
    assert answer_tokens(msgspec.structs.replace(load, spread=0.0), 7) == 100
    assert answer_tokens(msgspec.structs.replace(load, max_tokens=1, spread=0.9), 7) >= 1


def test_an_api_key_is_sent() -> None:
    target = Target(host="h", port=1, api_key="secret")
    job = Job(target=target, load=Load(words=1), clients=1, first=0, end=1)
    assert b"\r\nAuthorization: Bearer secret\r\n" in encode_request(job, 0)


@pytest.mark.parametrize(("host", "header"), [("localhost", b"localhost:8080"), ("::1", b"[::1]:8080")])
def test_the_host_header_is_the_authority_of_the_url(host: str, header: bytes) -> None:
    job = Job(target=Target(host=host, port=8080), load=Load(words=1), clients=1, first=0, end=1)
    assert b"\r\nHost: " + header + b"\r\n" in encode_request(job, 0)


async def test_without_usage_events_are_counted(server: ScriptedServer) -> None:
    outcome = await one(server, usage=False)
    assert (outcome.error, outcome.chunks, outcome.completion_tokens) == ("", 3, None)


async def test_a_stream_that_ends_with_its_connection(server: ScriptedServer) -> None:
    async def old(exchange: Exchange) -> None:
        exchange.head(version="1.0")
        exchange.writer.write(sse(text("a")) + sse(text("b", "stop")) + b"data: [DONE]\n\n")
        await exchange.writer.drain()
        exchange.writer.close()

    server.behaviour = old
    outcomes = await run(server, requests=3)
    assert [(o.error, o.chunks) for o in outcomes] == [("", 2)] * 3
    assert server.connections == 3


async def test_an_answer_in_one_piece(server: ScriptedServer) -> None:
    async def whole(exchange: Exchange) -> None:
        choice = {"message": {"content": "a b c"}, "finish_reason": "stop"}
        exchange.json(200, {"choices": [choice], "usage": USAGE})

    server.behaviour = whole
    outcome = await one(server)
    assert (outcome.error, outcome.streamed, outcome.completion_tokens, outcome.ttft) == ("", False, 3, None)


async def test_events_cut_anywhere(server: ScriptedServer) -> None:
    """Every way that TCP can cut a stream gives the same figures."""
    stream = b"".join(map(sse, (text("a"), text("ü"), text("c", "stop")))) + b"data: [DONE]\n\n"
    wire = (
        b"".join(b"%x;x=y\r\n%b\r\n" % (len(part), part) for part in (stream[:30], stream[30:])) + b"0\r\nT: t\r\n\r\n"
    )

    async def cut(exchange: Exchange) -> None:
        exchange.head(200, "text/event-stream; charset=utf-8", "transfer-encoding: Chunked")
        at = exchange.number + 1
        for piece in (wire[:at], wire[at:]):
            exchange.writer.write(piece)
            await exchange.writer.drain()
            await asyncio.sleep(0)

    server.behaviour = cut
    outcomes = await run(server, requests=len(wire) - 1)
    assert {(o.error, o.chunks, o.finish_reason) for o in outcomes} == {("", 3, "stop")}
    assert server.connections == 1


async def fails_with_500(exchange: Exchange) -> None:
    exchange.json(500, {"error": {"message": "out of luck"}})


async def fails_with_plain_text(exchange: Exchange) -> None:
    exchange.head(502, "text/html", "Content-Length: 9")
    exchange.writer.write(b"<b>no</b>")


async def resets(exchange: Exchange) -> None:
    await exchange.events(text("a"), done=False)
    exchange.reset()


async def closes_mid_stream(exchange: Exchange) -> None:
    await exchange.events(text("a"), done=False)
    exchange.writer.close()


async def closes_at_once(exchange: Exchange) -> None:
    exchange.writer.close()


async def ends_without_reason(exchange: Exchange) -> None:
    await exchange.events(text("a"), done=False)
    exchange.chunk(b"")


async def sends_an_error_event(exchange: Exchange) -> None:
    await exchange.events(text("a"), {"error": {"message": "the engine died"}}, done=False)
    exchange.chunk(b"")


async def sends_garbage_events(exchange: Exchange) -> None:
    exchange.head(200, "text/event-stream", "Content-Length: 12")
    exchange.writer.write(b"data: {oops\n")


async def speaks_no_http(exchange: Exchange) -> None:
    exchange.writer.write(b"220 smtp.example ready\r\n\r\n")


async def sends_bad_chunks(exchange: Exchange) -> None:
    exchange.head(200, "text/event-stream", "Transfer-Encoding: chunked")
    exchange.writer.write(b"zz\r\n")


async def sends_another_object(exchange: Exchange) -> None:
    exchange.json(200, ["hello"])


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        (fails_with_500, "http_500", "out of luck"),
        (fails_with_plain_text, "http_502", "<b>no</b>"),
        (resets, "reset", "reset"),
        (closes_mid_stream, "closed", "closed the connection"),
        (closes_at_once, "closed", "closed the connection"),
        (ends_without_reason, "incomplete", "without a finish reason"),
        (sends_an_error_event, "error_event", "the engine died"),
        (sends_garbage_events, "bad_event", "{oops"),
        (speaks_no_http, "bad_http", "not an HTTP answer"),
        (sends_bad_chunks, "bad_http", "zz"),
        (sends_another_object, "bad_body", "hello"),
    ],
)
async def test_failures_by_kind(server: ScriptedServer, behaviour: object, error: str, message: str) -> None:
    server.behaviour = behaviour  # type: ignore[assignment]
    outcome = await one(server)
    assert outcome.error == error
    assert message in outcome.message
    assert outcome.ended > outcome.began


async def test_a_failure_ends_neither_the_client_nor_the_others(server: ScriptedServer) -> None:
    async def sometimes(exchange: Exchange) -> None:
        await (resets if exchange.number % 3 == 1 else three_tokens)(exchange)

    server.behaviour = sometimes
    outcomes = await run(server, clients=2, requests=6)
    assert [o.error for o in outcomes].count("reset") == 2
    assert sum(o.completion_tokens or 0 for o in outcomes) == 12


async def test_a_request_that_takes_too_long(server: ScriptedServer) -> None:
    async def hangs(exchange: Exchange) -> None:
        await exchange.events(text("a"), done=False)
        await exchange.reader.read()

    server.behaviour = hangs
    outcome = await one(server, timeout=0.1)
    assert outcome.error == "timeout"
    assert outcome.ended - outcome.began >= 0.1


async def test_nobody_listens() -> None:
    server = ScriptedServer()
    server.port = 1
    outcomes = await run(server, requests=2)
    assert [o.error for o in outcomes] == ["connect", "connect"]
    assert "127.0.0.1" in outcomes[0].message


async def test_a_kept_connection_that_the_server_has_closed_is_no_failure(server: ScriptedServer) -> None:
    async def once(exchange: Exchange) -> None:
        if exchange.number == 1:
            exchange.writer.close()  # as an idle timeout that strikes while the next request is on its way
        else:
            await three_tokens(exchange)

    server.behaviour = once
    outcomes = await run(server, requests=2)
    assert [o.error for o in outcomes] == ["", ""]
    assert len(server.requests) == 3


async def test_no_request_begins_after_the_duration(server: ScriptedServer) -> None:
    outcomes = await run(server, clients=2, requests=1_000_000, duration=0.1)
    assert 2 <= len(outcomes) < 1_000_000
    first = min(o.began for o in outcomes)
    assert max(o.began for o in outcomes) - first <= 5, "within 0.1 s, and whatever a busy machine adds to it"


async def test_stopped_early_it_reports_what_there_is(server: ScriptedServer) -> None:
    asked = asyncio.Event()

    async def hangs(exchange: Exchange) -> None:
        await exchange.events(text("a"), done=False)
        asked.set()
        await exchange.reader.read()

    server.behaviour = hangs
    clients = Clients(server.job(clients=1, requests=5))
    running = asyncio.create_task(clients.run())
    await asked.wait()
    async with asyncio.timeout(60):
        while not clients.outcomes[0].chunks:
            await asyncio.sleep(0.001)
    clients.stop()
    report = await running
    assert report.stopped
    assert [(o.error, o.chunks) for o in report.outcomes] == [("interrupted", 1)]


async def test_what_a_level_has_no_time_for_is_unfinished(server: ScriptedServer) -> None:
    """A server that answers a request, refuses the next, says a word to the third, and is not heard of again."""

    async def tires(exchange: Exchange) -> None:
        match exchange.number:
            case 0:
                await three_tokens(exchange)
            case 1:
                exchange.json(503, {})
            case _:
                await exchange.events(text("a"), done=False)
                await exchange.reader.read()

    server.behaviour = tires
    report = await Clients(server.job(requests=6, limit=1.0)).run()
    assert [o.error for o in report.outcomes] == ["", "http_503", "unfinished"]
    assert (report.left, report.stopped) == (3, False)
    late = report.outcomes[-1]
    assert late.ttft is not None
    assert late.ended == late.began + late.ttft, "what came after its last token is no part of the level's time"
    level = level_of(1, [report])
    assert (level.requests, level.failed, level.unfinished, level.tokens) == (2, 1, 4, 4)
    assert not level.interrupted


async def test_a_level_within_its_limit_has_nothing_unfinished(server: ScriptedServer) -> None:
    report = await Clients(server.job(requests=3, limit=60.0)).run()
    assert (len(report.outcomes), report.left, level_of(1, [report]).unfinished) == (3, 0, 0)
