"""Counters, timers and log lines: their names, and nothing that costs start-up time.

Counts live in plain numbers; `runner.gateway.metrics` turns them into Prometheus text when somebody asks. Everything
here is written by the one event loop thread, so nothing is locked.
"""

from __future__ import annotations

import json
import logging
import time
from bisect import bisect_left
from typing import IO, Any, Final

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bucket bounds of request-scale times, in seconds."""

TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
"""Bucket bounds of the time between two tokens, in seconds."""

Labels = tuple[str, ...]


class Counter:
    """A family of numbers, one for each tuple of label values. It is a gauge when `add` also takes negative amounts."""

    __slots__ = ("help", "labels", "name", "values")

    def __init__(self, name: str, help: str, labels: Labels) -> None:  # noqa: A002 - Prometheus' word
        self.name = name
        self.help = help
        self.labels = labels
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Adds to the number of these label values."""
        self.values[labels] = self.values.get(labels, 0) + amount


class Series:
    """One histogram: `counts[i]` observations are ≤ `bounds[i]` and above the bound before; the last is the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts `value` `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class Histogram:
    """A family of histograms, one for each tuple of label values."""

    __slots__ = ("bounds", "help", "labels", "name", "values")

    def __init__(self, name: str, help: str, labels: Labels, bounds: tuple[float, ...]) -> None:  # noqa: A002
        self.name = name
        self.help = help
        self.labels = labels
        self.bounds = bounds
        self.values: dict[Labels, Series] = {}

    def series(self, labels: Labels) -> Series:
        """The histogram of these label values, to be held while many observations are made."""
        series = self.values.get(labels)
        if series is None:
            series = self.values[labels] = Series(self.bounds)
        return series


class GatewayMetrics:
    """What the gateway counts, for all listeners of a runner together."""

    def __init__(self) -> None:
        self.requests = Counter("mlx_run_requests", "Requests answered.", ("listener", "route", "model", "status"))
        self.in_flight = Counter("mlx_run_requests_in_flight", "Requests being worked on.", ("listener",))
        self.prompt_tokens = Counter("mlx_run_prompt_tokens", "Prompt tokens of finished requests.", ("model",))
        self.cached_tokens = Counter(
            "mlx_run_cached_prompt_tokens", "Of these, tokens that came from the prefix cache.", ("model",)
        )
        self.completion_tokens = Counter("mlx_run_completion_tokens", "Tokens sent to clients.", ("model",))
        self.request_seconds = Histogram(
            "mlx_run_request_seconds", "From the request's headers to the end of its answer.", ("route",), SECONDS
        )
        self.first_token_seconds = Histogram(
            "mlx_run_time_to_first_token_seconds", "From the request's headers to its first token.", ("model",), SECONDS
        )
        self.token_seconds = Histogram(
            "mlx_run_inter_token_seconds", "Between two tokens of one request.", ("model",), TOKEN_SECONDS
        )

    def counters(self) -> list[Counter]:
        """Those that only grow."""
        return [self.requests, self.prompt_tokens, self.cached_tokens, self.completion_tokens]

    def histograms(self) -> list[Histogram]:
        """All times."""
        return [self.request_seconds, self.first_token_seconds, self.token_seconds]


class TokenTimer:
    """Times one generation: seconds to its first token, then between tokens. Starts at `started` (perf_counter)."""

    __slots__ = ("_count", "_first", "_gaps", "_last", "_model", "_tokens")

    def __init__(self, metrics: GatewayMetrics, model: str, started: float) -> None:
        self._first: Series | None = metrics.first_token_seconds.series((model,))
        self._gaps = metrics.token_seconds.series((model,))
        self._tokens = metrics.completion_tokens
        self._model = (model,)
        self._last = started
        self._count = 0

    def tick(self, tokens: int) -> None:
        """`tokens` more have arrived, together; a batch without any is no event."""
        if not tokens:
            return
        now = time.perf_counter()
        if self._first is None:
            self._gaps.observe((now - self._last) / tokens, tokens)
        else:
            self._first.observe(now - self._last)
            self._first = None
        self._last = now
        self._count += tokens

    def stop(self) -> int:
        """Adds the tokens to the model's counter, once; returns how many there were."""
        count, self._count = self._count, 0
        if count:
            self._tokens.add(self._model, count)
        return count


# ------------------------------------------------------------------ log lines

_RECORD_KEYS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _RECORD_KEYS}


def _stamp(created: float) -> str:
    """Local time with milliseconds and the offset, as in RFC 3339."""
    local = time.localtime(created)
    zone = time.strftime("%z", local)
    milliseconds = int(created * 1000) % 1000
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{milliseconds:03d}{zone[:3]}:{zone[3:]}"


class TextFormatter(logging.Formatter):
    """`time level message key=value …`, then the traceback when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_text(value)}" for key, value in _fields(record).items())
        line = f"{_stamp(record.created)} {record.levelname.lower():7} {record.getMessage()}"
        if fields:
            line = f"{line} {fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, the fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _text(value: object) -> str:
    """A field's value in a text line: quoted when it would not read as one word, JSON when it has parts."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else json.dumps(text, ensure_ascii=False)


def configure_logging(level: str, *, stream: IO[str] | None = None, as_json: bool = False) -> None:
    """Sends the root logger to `stream` (standard error when None), replacing what handlers it had.

    Raises ValueError on an unknown level.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers[:] = [handler]
