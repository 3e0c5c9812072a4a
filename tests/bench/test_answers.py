"""Answers of the load generator, event by event: whichever way an event is read, it says the same."""

from __future__ import annotations

from array import array

import pytest

from runner.bench.answer import Answer
from runner.bench.http import Connection
from runner.bench.job import Outcome
from runner.bench.workers import processes_for
from tests.bench.server import sse, text


def read_answer(events: list[bytes]) -> tuple[Outcome, int]:
    """What is made of events that come one a read, and how many gaps there are."""
    outcome, gaps = Outcome(index=0, began=0.0), array("d")
    answer = Answer(outcome, gaps)
    answer.head(200, "text/event-stream")
    for number, event in enumerate(events):
        answer.feed(event, 1.0 + number)
    answer.end()
    return outcome, len(gaps)


@pytest.mark.parametrize("first", ["a", "id", "content", "finish_reason", '"', "é", "mlx-run", "a" * 5000])
def test_every_text_is_one_event(first: str) -> None:
    texts = [
        first,
        " token",
        "",
        '"',
        "\\",
        "\n",
        "é",
        "\u2028",
        'x"}}],"finish_reason":"stop',
        " token",
        "data: ",
        "~",
        " ",
    ]
    outcome, gaps = read_answer([sse(text(t)) for t in texts] + [sse(text("", "length")), b"data: [DONE]\n\n"])
    assert (outcome.chunks, gaps, outcome.error, outcome.finish_reason) == (12, 11, "", "length")


def test_times_are_those_of_the_events_with_content() -> None:
    outcome, gaps = Outcome(index=0, began=0.5), array("d")
    answer = Answer(outcome, gaps)
    answer.head(200, "text/event-stream")
    for now, content in ((1.0, ""), (2.0, "a"), (4.0, "b"), (5.0, ""), (8.0, "c")):
        answer.feed(sse(text(content)), now)
    assert (outcome.ttft, list(gaps), answer.last) == (1.5, [2.0, 4.0], 8.0)


@pytest.mark.parametrize("wrong", [b"\x01", b"\xff", b"\\x", b'"', b'"x"'])
def test_text_that_is_no_json_is_noticed_in_any_event(wrong: bytes) -> None:
    good = sse(text("PLACE"))
    outcome, _ = read_answer([good, good, good.replace(b"PLACE", wrong), good])
    assert (outcome.error, outcome.chunks) == ("bad_event", 3)


def test_an_error_among_events_that_are_alike_is_noticed() -> None:
    outcome, _ = read_answer([*[sse(text("a"))] * 8, sse({"error": {"message": "it broke"}})])
    assert (outcome.error, outcome.message, outcome.chunks) == ("error_event", "it broke", 8)


def test_events_that_say_more_than_text_are_decoded() -> None:
    plain = text("a")
    with_usage = {**plain, "usage": {"prompt_tokens": 3, "completion_tokens": 7}}
    outcome, gaps = read_answer([sse(plain)] * 3 + [sse(with_usage)] * 2 + [sse(text("b", "stop"))])
    assert (outcome.chunks, gaps, outcome.completion_tokens, outcome.finish_reason) == (6, 5, 7, "stop")


@pytest.mark.parametrize("cut", range(1, 40))
def test_chunks_cut_anywhere_are_put_together(cut: int) -> None:
    """The quick way for a read that is one chunk, beside the other for what is not."""
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in map(sse, map(text, ("a", "b", "c", "d")))]
    data = b"".join(chunks)
    outcome = Outcome(index=0, began=0.0)
    connection, answer = Connection(), Answer(outcome, array("d"))
    answer.head(200, "text/event-stream")
    connection._answer, connection._in_body, connection._chunked = answer, True, True
    for piece in (chunks[0], data[len(chunks[0]) :][:cut], data[len(chunks[0]) + cut :]):
        assert connection._one_chunk(piece, 1.0) or connection._chunks(piece, 1.0) is None
    assert outcome.chunks == 4


@pytest.mark.parametrize(
    ("cores", "taken"), [(2, (1, 1, 1, 1)), (8, (1, 1, 2, 2)), (16, (1, 1, 4, 4)), (128, (1, 1, 4, 4))]
)
def test_processes_by_cores(cores: int, taken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert tuple(map(processes_for, (1, 32, 128, 512))) == taken
