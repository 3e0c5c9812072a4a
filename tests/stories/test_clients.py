"""The official packages for Python, over real processes: talk, stream, tools, a schema, an adapter, errors, leaving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.stories.demo import LONG, long_answer
from tests.stories.harness import Bench, until

pytestmark = [pytest.mark.story, pytest.mark.mlx]

WEATHER = "What is the weather in Oslo?"
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EXTRACT = "Extract the name and age as JSON: Nora is 34 years old."
SUNNY = "The tool says: sunny, 21 degrees."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server with every API."""
    bench = Bench(tmp_path_factory.mktemp("clients"))
    bench.write()
    text = bench.manifest.read_text()
    text = text.replace(f"{{port: {bench.port}}}", f"{{port: {bench.port}, apis: [openai, anthropic, ollama]}}")
    bench.save(text.replace("  demo-chat:\n", "  chat:\n"))
    with bench.serving():
        yield bench
    bench.close()


@pytest.fixture
def of_openai(served: Bench) -> openai.OpenAI:
    return served.client()


@pytest.fixture
def of_anthropic(served: Bench) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def of_ollama(served: Bench) -> Iterator[ollama.Client]:
    client = ollama.Client(host=served.url)
    yield client
    client._client.close()


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


class TestOpenAI:
    def test_tools_round_trip_streamed(self, of_openai: openai.OpenAI) -> None:
        with of_openai.chat.completions.stream(
            model="chat", messages=user(WEATHER), tools=[TOOL], temperature=0
        ) as stream:
            stream.until_done()
            message = stream.get_final_completion().choices[0].message
        (call,) = message.tool_calls or ()
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        turns = [*user(WEATHER), message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
        answer = of_openai.chat.completions.create(model="chat", messages=turns, tools=[TOOL], temperature=0)
        assert answer.choices[0].message.content == SUNNY

    def test_a_named_tool_is_called(self, of_openai: openai.OpenAI) -> None:
        choice: Any = {"type": "function", "function": {"name": "get_weather"}}
        answer = of_openai.chat.completions.create(
            model="chat", messages=user("What is 17 + 25?"), tools=[TOOL], tool_choice=choice, max_tokens=200
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert "city" in json.loads(call.function.arguments)

    def test_an_answer_that_fits_a_schema(self, of_openai: openai.OpenAI) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        answer = of_openai.chat.completions.create(
            model="chat", messages=user(EXTRACT), response_format=form, temperature=0
        )
        assert json.loads(answer.choices[0].message.content or "") == {"name": "Nora", "age": 34}

    def test_an_adapter_and_what_is_not_there(self, of_openai: openai.OpenAI) -> None:
        ask = of_openai.chat.completions.create
        answer = ask(
            model="chat", messages=user("What is 17 + 25?"), temperature=0, extra_body={"adapter_name": "pirate"}
        )
        assert answer.choices[0].message.content == "Arr! 17 + 25 be 42, matey."
        with pytest.raises(openai.NotFoundError):
            ask(model="chat:pirat", messages=user("hi"))
        with pytest.raises(openai.BadRequestError, match="temperature"):
            ask(model="chat", messages=user("hi"), temperature=9)

    def test_a_response_and_the_next(self, of_openai: openai.OpenAI) -> None:
        first = of_openai.responses.create(model="chat", input="My name is Nora.", temperature=0)
        second = of_openai.responses.create(
            model="chat", input="What is my name?", previous_response_id=first.id, temperature=0
        )
        assert second.output_text == "Your name is Nora."


ANTHROPIC_TOOL: Any = {"name": "get_weather", "input_schema": PARAMETERS}


class TestAnthropic:
    def test_tools_round_trip_streamed(self, of_anthropic: anthropic.Anthropic) -> None:
        with of_anthropic.messages.stream(
            model="chat", max_tokens=200, messages=user(WEATHER), tools=[ANTHROPIC_TOOL], extra_body={"temperature": 0}
        ) as stream:
            message = stream.get_final_message()
        (call,) = (block for block in message.content if block.type == "tool_use")
        assert call.input == {"city": "Oslo"}
        assert message.stop_reason == "tool_use"
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 21 degrees"}
        turns: Any = [*user(WEATHER), {"role": "assistant", "content": message.content}]
        turns.append({"role": "user", "content": [result]})
        answer = of_anthropic.messages.create(
            model="chat", max_tokens=200, messages=turns, tools=[ANTHROPIC_TOOL], extra_body={"temperature": 0}
        )
        assert [block.text for block in answer.content if block.type == "text"] == [SUNNY]

    def test_some_tool_is_called_and_an_answer_fits_a_schema(self, of_anthropic: anthropic.Anthropic) -> None:
        called = of_anthropic.messages.create(
            model="chat", max_tokens=200, messages=user("Hello!"), tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}
        )
        assert called.stop_reason == "tool_use"
        answer = of_anthropic.messages.create(
            model="chat",
            max_tokens=200,
            messages=user(EXTRACT),
            output_config={"format": {"type": "json_schema", "schema": PERSON}},
            extra_body={"temperature": 0},
        )
        assert json.loads(answer.content[0].text) == {"name": "Nora", "age": 34}  # type: ignore[union-attr]

    def test_an_adapter_a_prefill_and_errors(self, of_anthropic: anthropic.Anthropic) -> None:
        ask = of_anthropic.messages.create
        cold = {"temperature": 0}
        answer = ask(model="chat:shout", max_tokens=99, messages=user("What is 17 + 25?"), extra_body=cold)
        assert answer.content[0].text == "17 + 25 = 42!!!"  # type: ignore[union-attr]
        begun: Any = [*user("What is 17 + 25?"), {"role": "assistant", "content": "17 + 25 ="}]
        answer = ask(model="chat", max_tokens=99, messages=begun, extra_body=cold)
        assert answer.content[0].text == " 42."  # type: ignore[union-attr]
        with pytest.raises(anthropic.NotFoundError):
            ask(model="llama", max_tokens=9, messages=user("hi"))


class TestOllama:
    def test_tools_round_trip_and_a_schema(self, of_ollama: ollama.Client) -> None:
        cold = {"temperature": 0}
        first = of_ollama.chat("chat", user(WEATHER), tools=[TOOL], options=cold)
        (call,) = first.message.tool_calls or ()
        assert call.function.arguments == {"city": "Oslo"}
        turns = [*user(WEATHER), first.message, {"role": "tool", "content": "sunny, 21 degrees"}]
        assert of_ollama.chat("chat", turns, tools=[TOOL], options=cold).message.content == SUNNY
        fits = of_ollama.chat("chat", user(EXTRACT), format=PERSON, options=cold).message.content
        assert json.loads(fits or "") == {"name": "Nora", "age": 34}

    def test_an_adapter_is_a_model_and_errors_say_so(self, of_ollama: ollama.Client) -> None:
        cold = {"temperature": 0}
        assert (
            of_ollama.generate("chat:pirate", "What is 17 + 25?", options=cold).response == "Arr! 17 + 25 be 42, matey."
        )
        with pytest.raises(ollama.ResponseError, match="llama"):
            of_ollama.generate("llama", "hi")


def test_leaving_mid_stream_frees_the_row_on_every_surface(
    served: Bench, of_openai: openai.OpenAI, of_anthropic: anthropic.Anthropic, of_ollama: ollama.Client
) -> None:
    with of_openai.chat.completions.create(model="chat", messages=user(LONG), stream=True) as chunks:
        next(iter(chunks))
    with of_anthropic.messages.create(model="chat", max_tokens=900, messages=user(LONG), stream=True) as events:
        next(iter(events))
    lines = of_ollama.chat("chat", user(LONG), stream=True)
    next(iter(lines))
    lines.close()  # type: ignore[attr-defined]
    until(lambda: served.metric("mlx_run_engine_rows") == 0)
    answer = of_openai.chat.completions.create(model="chat", messages=user(LONG), temperature=0)
    assert answer.choices[0].message.content == long_answer("base")


def test_both_documents_are_there(served: Bench) -> None:
    assert "/v1/messages" in httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert httpx.get(f"{served.url}/docs").headers["content-type"].startswith("text/html")
