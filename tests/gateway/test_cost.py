"""What a token may cost between the engine's frame and the HTTP server (`tests/bench/gateway_cost.py` adds that)."""

from tests.bench.gateway_path import step_micros

MOST = 15.0
"""Microseconds of CPU a token at 128 streams. It takes 6; a machine that is busy with other things adds to it."""


async def test_a_token_costs_little() -> None:
    times = await step_micros(streams=128, steps=100)
    assert times[0] <= MOST
