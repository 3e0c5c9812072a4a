"""Sizes, durations, names, hosts: what they come to, and that the JSON schema's patterns agree."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runner.manifest.values import (
    Alias,
    Duration,
    Host,
    MemoryAmount,
    MemorySize,
    Name,
    Origin,
    Size,
    format_size,
)


def _both(kind: Any, value: Any) -> tuple[Any, bool]:
    """What the type makes of a value (None: refused), and whether its schema takes it."""
    adapter = TypeAdapter(kind)
    schema = adapter.json_schema()
    choices = schema.get("anyOf", [schema])
    taken = any(_takes(choice, value) for choice in choices)
    try:
        return adapter.validate_python(value, strict=True), taken
    except ValidationError:
        return None, taken


def _takes(choice: dict[str, Any], value: Any) -> bool:
    if choice["type"] == "integer":
        return isinstance(value, int) and not isinstance(value, bool) and value >= choice.get("minimum", value)
    return isinstance(value, str) and re.search(choice["pattern"], value) is not None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1048576, 2**20),
        ("512", 512),
        ("512B", 512),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("4 GB", 4 * 10**9),
        ("1TiB", 2**40),
        ("999999999999999", 999999999999999),
    ],
)
def test_size(text: Any, size: int) -> None:
    assert _both(Size, text) == (size, True)
    assert _both(MemorySize, text) == (MemoryAmount(size=size), True)


@pytest.mark.parametrize(
    "text", ["", "GiB", "4gb", "4G", "-4GiB", -1, "1,5GB", "4  GB", " 4GB", "0x10", "1e3", True, 1.5, None, [], "٤GB"]
)
def test_no_size(text: Any) -> None:
    assert _both(Size, text) == (None, False)
    assert _both(MemorySize, text) == (None, False)


@pytest.mark.parametrize(("text", "percent"), [("75%", 75.0), ("12.5 %", 12.5), ("0%", 0.0), ("100%", 100.0)])
def test_percent(text: str, percent: float) -> None:
    assert _both(MemorySize, text) == (MemoryAmount(percent=percent), True)
    assert _both(Size, text) == (None, False)


@pytest.mark.parametrize("text", ["101%", "100.1%", "-1%", "%", "1%%", "x%"])
def test_no_percent(text: str) -> None:
    assert _both(MemorySize, text) == (None, False)


def test_memory_amount_of_a_machine() -> None:
    assert MemoryAmount(percent=75).of(16 * 2**30) == 12 * 2**30
    assert MemoryAmount(size=5).of(16 * 2**30) == 5


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("1h1m1s", 3661), ("0s", 0)]
)
def test_duration(text: str, seconds: int) -> None:
    assert _both(Duration, text) == (float(seconds), True)


@pytest.mark.parametrize("text", ["", "30", 30, "s", "1m1h", "1.5h", "-1s", "1 h", "1d", "5M", None])
def test_no_duration(text: Any) -> None:
    assert _both(Duration, text) == (None, False)


@pytest.mark.parametrize("text", ["chat", "llama-3.2", "a", "0", "x_y", "x-y", "a" * 63])
def test_name(text: str) -> None:
    assert _both(Name, text) == (text, True)


@pytest.mark.parametrize("text", ["", "Chat", "a:b", "a/b", ".a", "-a", "_a", "a b", "ä", "a" * 64, "a\n"])
def test_no_name(text: str) -> None:
    assert _both(Name, text)[0] is None
    if text != "a\n":  # `$` in a pattern of Python's takes a line break; the pattern of JSON schema does not
        assert _both(Name, text)[1] is False


@pytest.mark.parametrize("text", ["gpt-4o-mini", "GPT", "meta-llama/Llama-3.2-1B", "a.b_c"])
def test_alias(text: str) -> None:
    assert _both(Alias, text) == (text, True)


@pytest.mark.parametrize("text", ["", "a:b", "/a", "a b", "-a"])
def test_no_alias(text: str) -> None:
    assert _both(Alias, text) == (None, False)


@pytest.mark.parametrize("text", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost", "fe80::1", "::ffff:10.0.0.1"])
def test_host(text: str) -> None:
    assert _both(Host, text) == (text, True)


@pytest.mark.parametrize("text", ["", "example.com", "[::1]", "127.0.0.1:80", "*", "LOCALHOST"])
def test_no_host(text: str) -> None:
    assert _both(Host, text)[0] is None


@pytest.mark.parametrize("text", ["*", "http://localhost:3000", "https://a.b", "tauri://localhost"])
def test_origin(text: str) -> None:
    assert _both(Origin, text) == (text, True)


@pytest.mark.parametrize(
    "text", ["", "localhost", "http://", "http://a/", "http://a?b", "http://*", "http://u@a", "**"]
)
def test_no_origin(text: str) -> None:
    assert _both(Origin, text) == (None, False)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (8854016, "8.4 MiB"), (2**30, "1 GiB"), (3 * 2**39, "1.5 TiB")],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text
