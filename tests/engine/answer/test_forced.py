"""Models that have to call a tool do so, in their own convention, with arguments that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from runner.engine.answer.conventions import Conventions, tool_convention
from runner.engine.chat import ChatTemplate, jinja_render
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel
from runner.engine.loop import Engine
from runner.protocol import Delta, FromEngine, Generate, Rejected, Sampling, Step

TEMPLATE = "{{ tools and '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour"],
    "additionalProperties": False,
}
DAYS = {
    "type": "object",
    "properties": {"day": {"enum": ["monday", "friday"]}},
    "required": ["day"],
    "additionalProperties": False,
}
SCHEMAS = {"paint": COLOURS, "plan_day": DAYS}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
NAMES = list(SCHEMAS)
FORCED = ["json_tools", "llama3", "mistral", "deepseek", "kimi_k2", "pythonic", "harmony"]


def speaking(llama: LoadedModel, name: str) -> LoadedModel:
    """The tiny model with that convention, and a template that takes tools."""
    spoken = Conventions(harmony=True) if name == "harmony" else Conventions(tool_convention(name))
    fence = "{# ```json #}" if name == "deepseek" else ""
    return replace(llama, conventions=spoken, chat=ChatTemplate(jinja_render(TEMPLATE + fence, {})))


@pytest.fixture(scope="module")
def engines(llama: LoadedModel) -> Callable[[str], tuple[Engine, list[FromEngine]]]:
    """An engine for each convention, with the frames that it sends: compiling grammars has its costs once."""
    made: dict[str, tuple[Engine, list[FromEngine]]] = {}

    def get(name: str) -> tuple[Engine, list[FromEngine]]:
        if name not in made:
            frames: list[FromEngine] = []
            made[name] = Engine(speaking(llama, name), Limits(), frames.append), frames
        return made[name]

    return get


Run = Callable[..., list[Delta] | Rejected]


@pytest.fixture
def run(engines: Callable[[str], tuple[Engine, list[FromEngine]]]) -> Run:
    """All deltas of one request, or its refusal."""

    def one(name: str, **fields: Any) -> list[Delta] | Rejected:
        engine, frames = engines(name)
        frames.clear()
        engine.submit(Generate(id=1, messages=[{"role": "user", "content": "hello world"}], **fields))
        while engine.rows:
            engine.step()
        for frame in frames:
            if isinstance(frame, Rejected):
                return frame
        return [delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas]

    return one


def calls_of(answer: list[Delta] | Rejected) -> list[tuple[str, Any]]:
    assert not isinstance(answer, Rejected), answer
    return [(call.name, json.loads(call.arguments)) for delta in answer for call in delta.calls or ()]


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_calls_a_tool_with_arguments_that_fit(run: Run, name: str, seed: int) -> None:
    answer = run(
        name,
        tools=TOOLS,
        must_call=NAMES,
        parallel_tool_calls=False,
        max_tokens=400 if name != "harmony" else 0,
        sampling=Sampling(temperature=1.0, seed=seed),
    )
    ((called, arguments),) = calls_of(answer)
    jsonschema.validate(arguments, SCHEMAS[called])
    assert not isinstance(answer, Rejected)
    assert answer[-1].finish_reason == "tool_calls"
    assert "".join(delta.text for delta in answer) == ""


@pytest.mark.parametrize("name", FORCED)
def test_a_named_tool_is_the_one_that_is_called(run: Run, name: str) -> None:
    answer = run(name, tools=TOOLS, must_call=["plan_day"], parallel_tool_calls=False)
    ((called, arguments),) = calls_of(answer)
    assert called == "plan_day"
    jsonschema.validate(arguments, DAYS)


def test_a_convention_that_cannot_be_forced_is_refused(run: Run) -> None:
    refusal = run("minimax_m2", tools=TOOLS, must_call=NAMES)
    assert isinstance(refusal, Rejected)
    assert (refusal.status, refusal.param, refusal.code) == (400, "tool_choice", "unsupported_by_model")


def strict(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]


@pytest.mark.parametrize("name", ["json_tools", "deepseek", "mistral", "pythonic"])
def test_with_strict_tools_a_call_that_is_begun_fits(run: Run, name: str) -> None:
    """The marker is made likely; whatever the random model writes then is a call that fits, or it is cut."""
    marker = tool_convention(name)
    answer = run(
        name,
        tools=strict(TOOLS),
        parallel_tool_calls=False,
        max_tokens=60,
        sampling=Sampling(temperature=1.0, seed=1),
    )
    assert not isinstance(answer, Rejected), answer
    for called, arguments in calls_of(answer):
        jsonschema.validate(arguments, SCHEMAS[called])
    text = "".join(delta.text for delta in answer)
    assert marker.start not in text or answer[-1].finish_reason == "length"


def test_a_strict_schema_that_cannot_be_kept_is_refused(run: Run) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}
    tools = strict([{"type": "function", "function": {"name": "f", "parameters": odd}}])
    refusal = run("json_tools", tools=tools)
    assert isinstance(refusal, Rejected)
    assert refusal.param == "tools[0].function.parameters"
    assert "nullable" in refusal.reason
