"""What an engine's connection refuses before anything is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runner.control.connection import EngineConnection
from runner.errors import InvalidRequest
from runner.protocol import FromEngine, Generate


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"function": {"name": "f", "parameters": {"maximum": 2**64}}}]),
        ("tools", [{"function": {"name": "f", "parameters": {"minimum": -(10**40)}}}]),
        ("tools", [{"function": {"name": "f", "parameters": nested(100_000)}}]),
        ("chat_template_kwargs", {"deadline": 10**30}),
    ],
)
async def test_what_no_frame_can_carry_is_the_requests_fault(field: str, value: Any) -> None:
    messages: list[FromEngine] = []
    connection, wire = EngineConnection(messages.append, lambda: None), Wire()
    connection.connection_made(wire)
    fields: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest, match=f"`{field}` .* integer over 64 bits") as raised:
        await anext(connection.generate(Generate(id=0, prompt="x", **fields)))
    assert raised.value.param == field
    assert connection.in_flight == 0
