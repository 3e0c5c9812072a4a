from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from runner import telemetry
from runner.telemetry import GatewayMetrics, JsonFormatter, Series, TextFormatter, TokenTimer, configure_logging


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "runner.x", "levelno": logging.INFO, "levelname": "INFO", "msg": message})
    vars(made).update(fields)
    return made


def test_text_lines_have_the_message_and_then_fields() -> None:
    line = TextFormatter().format(record("engine ready", model="chat", seconds=1.5, reason="two words", empty=""))
    stamp, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", stamp)
    assert rest == 'info    engine ready model=chat seconds=1.5 reason="two words" empty=""'


def test_json_lines_decode_and_keep_types() -> None:
    try:
        raise ValueError("böse")
    except ValueError as error:
        made = record("engine ready", model="chat", tokens=3, path=object)
        made.exc_info = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(made)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["message"]) == ("info", "runner.x", "engine ready")
    assert (fields["model"], fields["tokens"]) == ("chat", 3)
    assert "ValueError: böse" in fields["exception"]


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_configure_logging_replaces_handlers_and_sets_the_level(root: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging("warning", stream=stream, as_json=True)
    logging.getLogger("runner.a").info("not this")
    logging.getLogger("runner.a").warning("this", extra={"n": 1})
    assert [json.loads(line)["n"] for line in stream.getvalue().splitlines()] == [1]
    assert len(root.handlers) == 1


def test_an_unknown_level_changes_nothing(root: logging.Logger) -> None:
    before = list(root.handlers)
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("loud")
    assert root.handlers == before


def test_series_count_into_the_bucket_whose_bound_holds() -> None:
    series = Series((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        series.observe(value)
    series.observe(0.25, count=4)
    assert series.counts == [6, 2, 1]
    assert series.sum == 8.5


def test_a_timer_tells_the_first_token_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.5, 10.75, 11.25])
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    metrics = GatewayMetrics()
    timer = TokenTimer(metrics, "chat", 10.0)
    timer.tick(1)
    timer.tick(0)
    timer.tick(1)
    timer.tick(2)
    assert metrics.first_token_seconds.series(("chat",)).sum == 0.5
    gaps = metrics.token_seconds.series(("chat",))
    assert sum(gaps.counts) == 3
    assert gaps.sum == pytest.approx(0.75)
    assert timer.stop() == 4
    assert timer.stop() == 0, "counted once"
    assert metrics.completion_tokens.values == {("chat",): 4}
