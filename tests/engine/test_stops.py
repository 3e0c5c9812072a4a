"""Stop strings in pieces of any size."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.stops import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """All text that comes out, and whether it was stopped."""
    watcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        text, stopped = watcher.feed(piece)
        out += text
        if stopped:
            return out, True
    return out + watcher.flush(), False


@given(
    text=st.text(alphabet="abc", max_size=24),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_equals_cutting_the_whole_text_at_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    # The stop that is complete first wins; of two that end together, the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    out, stopped = run(stops, list(text))
    assert stopped == bool(ends)
    if ends:
        assert out == text[: min(ends)[1]]
    else:
        assert out == text
    assert run(stops, pieces)[1] == stopped
    assert text.startswith(run(stops, pieces)[0])


@pytest.mark.parametrize(
    ("pieces", "sent"),
    [(["a", "S", "T"], ["a", "", ""]), (["aS", "x"], ["a", "Sx"]), (["aST", "T"], ["a", "STT"]), (["SSTO"], ["S"])],
)
def test_holds_back_only_what_may_become_a_stop(pieces: list[str], sent: list[str]) -> None:
    watcher = StopStrings(["STOP"])
    assert [watcher.feed(piece)[0] for piece in pieces] == sent


def test_without_stops_nothing_is_held() -> None:
    watcher = StopStrings([""])
    assert watcher.feed("anything") == ("anything", False)
    assert watcher.flush() == ""


def test_what_was_held_comes_out_at_the_end() -> None:
    watcher = StopStrings(["###"])
    assert watcher.feed("text##") == ("text", False)
    assert watcher.flush() == "##"
    assert watcher.flush() == ""


def test_says_which_stop_it_was() -> None:
    watcher = StopStrings(["END", "STOP"])
    assert watcher.matched == ""
    watcher.feed("a ST")
    watcher.feed("OP")
    assert watcher.matched == "STOP"
