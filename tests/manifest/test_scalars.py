"""Scalars are what they look like in YAML 1.2."""

from __future__ import annotations

import math

import pytest

from runner.manifest.scalars import Scalar, read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("nUll", "nUll"),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("0", 0),
        ("-17", -17),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1e3", -1000.0),
        ("1e-05", 0.00001),
        (".", "."),
        ("-", "-"),
        ("+", "+"),
        ("1.2.3", "1.2.3"),
        ("127.0.0.1", "127.0.0.1"),
        ("1e", "1e"),
        ("e1", "e1"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("30s", "30s"),
        ("=", "="),
        ("٣", "٣"),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", 2.0**63),
        ("08231374eeacb049a0eade7922910865b8fce912", "08231374eeacb049a0eade7922910865b8fce912"),
    ],
)
def test_value(text: str, value: Scalar) -> None:
    found = read_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_infinities_and_nan() -> None:
    assert read_scalar(".inf") == math.inf
    assert read_scalar("+.Inf") == math.inf
    assert read_scalar("-.INF") == -math.inf
    nan = read_scalar(".NaN")
    assert isinstance(nan, float)
    assert math.isnan(nan)


def test_absurdly_long_numbers_are_read_in_no_time() -> None:
    assert isinstance(read_scalar("9" * 100_000), str)
    assert read_scalar("9" * 300) == pytest.approx(float("9" * 300))
