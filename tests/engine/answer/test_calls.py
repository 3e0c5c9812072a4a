"""Calls and reasoning through the loop, with the demo model: it was taught to call tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel, load
from runner.engine.loop import Engine
from runner.errors import EngineLoadError
from runner.protocol import Delta, FromEngine, Generate, Rejected, Step

DEMO = Path(__file__).parents[3] / "examples/models/demo-chat"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load(DEMO)


def answer(loaded: LoadedModel, **fields: Any) -> list[Delta]:
    """All deltas of one request; a refusal is an AssertionError."""
    frames: list[FromEngine] = []
    engine = Engine(loaded, Limits(), frames.append)
    engine.submit(Generate(id=1, messages=QUESTION, **fields))
    while engine.busy:
        engine.step()
    refused = [frame.reason for frame in frames if isinstance(frame, Rejected)]
    assert not refused, refused
    return [delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas]


def test_the_demo_model_calls_a_tool(demo: LoadedModel) -> None:
    deltas = answer(demo, tools=[TOOL])
    calls = [call for delta in deltas for call in delta.calls or ()]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("get_weather", {"city": "Oslo"})]
    assert "".join(delta.text for delta in deltas) == ""
    assert deltas[-1].finish_reason == "tool_calls"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == sum(delta.tokens for delta in deltas)


def test_an_answer_without_a_call_ends_as_ever(demo: LoadedModel) -> None:
    frames: list[FromEngine] = []
    engine = Engine(demo, Limits(), frames.append)
    engine.submit(Generate(id=1, messages=[{"role": "user", "content": "What is 17 + 25?"}], tools=[TOOL]))
    while engine.busy:
        engine.step()
    deltas = [delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas]
    assert "".join(delta.text for delta in deltas) == "17 + 25 = 42."
    assert deltas[-1].finish_reason == "stop"


def test_a_call_that_hits_max_tokens_is_text(demo: LoadedModel) -> None:
    deltas = answer(demo, tools=[TOOL], max_tokens=6)
    assert deltas[-1].finish_reason == "length"
    assert "".join(delta.text for delta in deltas).startswith("<tool_call>")
    assert not any(delta.calls for delta in deltas)


def test_an_unknown_parser_is_refused_at_load() -> None:
    with pytest.raises(EngineLoadError, match=r"no tool parser is called .hermes.; .*json_tools"):
        load(DEMO, "hermes")


def test_tools_for_a_model_that_cannot_call_them_are_refused(llama: LoadedModel) -> None:
    frames: list[FromEngine] = []
    engine = Engine(llama, Limits(), frames.append)
    engine.submit(Generate(id=1, messages=QUESTION, tools=[TOOL]))
    (refusal,) = frames
    assert isinstance(refusal, Rejected)
    assert (refusal.status, refusal.param, refusal.code) == (400, "tools", "tools_not_supported")
