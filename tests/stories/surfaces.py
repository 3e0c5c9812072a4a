"""Every surface's way to ask one question, streamed or not, and what comes back of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

Calls = list[tuple[str, Any]]
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """Text, calls (name, arguments) and completion tokens."""

    text: str
    calls: Calls
    tokens: int


@dataclass(frozen=True, slots=True)
class Surface:
    """`body` makes a request of messages, tools, stop strings and a seed; `whole` and `stream` read the answers.

    `form` is what a body has for an answer that fits a JSON Schema.
    """

    path: str
    body: Callable[[list[Body], list[Body], list[str], int], Body]
    whole: Callable[[Body], Answer]
    stream: Callable[[Iterator[Body]], Answer]
    form: Callable[[Body], Body]
    lines: bool = False
    stops: bool = True

    def ask(self, client: httpx.Client, body: Body) -> Answer:
        """In one piece."""
        answer = client.post(self.path, json={**body, "stream": False})
        assert answer.status_code == 200, answer.text
        return self.whole(answer.json())

    def ask_streamed(self, client: httpx.Client, body: Body) -> Answer:
        """In pieces."""
        with client.stream("POST", self.path, json={**self.asked(body), "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            return self.stream(self._objects(answer))

    def asked(self, body: Body) -> Body:
        """A body that has the usage in its stream as well."""
        wants = self.path in ("/v1/chat/completions", "/v1/completions")
        return {**body, "stream_options": {"include_usage": True}} if wants else body

    def _objects(self, answer: httpx.Response) -> Iterator[Body]:
        for line in answer.iter_lines():
            data = line if self.lines else line.removeprefix("data: ") if line.startswith("data: ") else ""
            if data and data != "[DONE]":
                yield json.loads(data)


def _openai_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    body = {"model": "chat", "messages": messages, "seed": seed, "temperature": 0.8, "max_tokens": 96}
    return {**body, **({"tools": tools} if tools else {}), **({"stop": stop} if stop else {})}


def _openai_whole(answer: Body) -> Answer:
    message = answer["choices"][0]["message"]
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    return Answer(message["content"] or "", calls, answer["usage"]["completion_tokens"])


def _openai_stream(objects: Iterator[Body]) -> Answer:
    text, calls, tokens = "", [], 0
    for chunk in objects:
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in chunk["choices"]:
            delta = choice["delta"]
            text += delta.get("content") or ""
            calls += [
                (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in delta.get("tool_calls", ())
            ]
    return Answer(text, calls, tokens)


def _anthropic_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    system = [message["content"] for message in messages if message["role"] == "system"]
    shown = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in tools]
    turns = [message for message in messages if message["role"] != "system"]
    body = {"model": "chat", "messages": turns, "seed": seed, "temperature": 0.8, "max_tokens": 96}
    body |= {"system": system[0]} if system else {}
    return {**body, **({"tools": shown} if tools else {}), **({"stop_sequences": stop} if stop else {})}


def _anthropic_whole(answer: Body) -> Answer:
    text = "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    calls = [(block["name"], block["input"]) for block in answer["content"] if block["type"] == "tool_use"]
    return Answer(text, calls, answer["usage"]["output_tokens"])


def _anthropic_stream(objects: Iterator[Body]) -> Answer:
    text, calls, tokens, name = "", [], 0, ""
    for event in objects:
        if event["type"] == "content_block_start":
            name = event["content_block"].get("name", "")
        elif event["type"] == "content_block_delta":
            text += event["delta"].get("text", "")
            if "partial_json" in event["delta"]:
                calls.append((name, json.loads(event["delta"]["partial_json"])))
        elif event["type"] == "message_delta":
            tokens = event["usage"]["output_tokens"]
    return Answer(text, calls, tokens)


def _responses_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    shown = [{"type": "function", **tool["function"]} for tool in tools]
    body = {"model": "chat", "input": messages, "seed": seed, "temperature": 0.8, "max_output_tokens": 96}
    return {**body, **({"tools": shown} if tools else {}), "store": False}


def _responses_whole(answer: Body) -> Answer:
    parts = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    calls = [(i["name"], json.loads(i["arguments"])) for i in answer["output"] if i["type"] == "function_call"]
    return Answer("".join(part["text"] for part in parts), calls, answer["usage"]["output_tokens"])


def _responses_stream(objects: Iterator[Body]) -> Answer:
    text, calls, tokens = "", [], 0
    for event in objects:
        if event["type"] == "response.output_text.delta":
            text += event["delta"]
        elif event["type"] == "response.function_call_arguments.done":
            calls.append((event["name"], json.loads(event["arguments"])))
        elif event["type"] in ("response.completed", "response.incomplete"):
            tokens = event["response"]["usage"]["output_tokens"]
    return Answer(text, calls, tokens)


def _ollama_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    options: Body = {"seed": seed, "temperature": 0.8, "num_predict": 96}
    options |= {"stop": stop} if stop else {}
    return {"model": "chat", "messages": messages, "options": options, **({"tools": tools} if tools else {})}


def _ollama_whole(answer: Body) -> Answer:
    return _ollama_stream(iter([answer]))


def _ollama_stream(objects: Iterator[Body]) -> Answer:
    text, calls, tokens = "", [], 0
    for line in objects:
        text += line["message"]["content"]
        calls += [(c["function"]["name"], c["function"]["arguments"]) for c in line["message"].get("tool_calls", ())]
        tokens = line.get("eval_count", tokens)
    return Answer(text, calls, tokens)


def _completion_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    body = {"model": "chat", "prompt": messages[-1]["content"], "seed": seed, "temperature": 0.8, "max_tokens": 96}
    return {**body, "echo": bool(seed % 2), **({"stop": stop} if stop else {})}


def _completion_whole(answer: Body) -> Answer:
    return Answer(answer["choices"][0]["text"], [], answer["usage"]["completion_tokens"])


def _completion_stream(objects: Iterator[Body]) -> Answer:
    text, tokens = "", 0
    for chunk in objects:
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        text += "".join(choice["text"] for choice in chunk["choices"])
    return Answer(text, [], tokens)


def _generate_body(messages: list[Body], tools: list[Body], stop: list[str], seed: int) -> Body:
    body = _ollama_body(messages, [], stop, seed)
    del body["messages"]
    return {**body, "prompt": messages[-1]["content"]}


def _generate_whole(answer: Body) -> Answer:
    return _generate_stream(iter([answer]))


def _generate_stream(objects: Iterator[Body]) -> Answer:
    text, tokens = "", 0
    for line in objects:
        text += line["response"]
        tokens = line.get("eval_count", tokens)
    return Answer(text, [], tokens)


def _named(schema: Body) -> Body:
    return {"type": "json_schema", "name": "form", "schema": schema}


SURFACES = {
    "chat": Surface(
        "/v1/chat/completions",
        _openai_body,
        _openai_whole,
        _openai_stream,
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}},
    ),
    "responses": Surface(
        "/v1/responses",
        _responses_body,
        _responses_whole,
        _responses_stream,
        lambda schema: {"text": {"format": _named(schema)}},
        stops=False,
    ),
    "anthropic": Surface(
        "/v1/messages",
        _anthropic_body,
        _anthropic_whole,
        _anthropic_stream,
        lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    ),
    "ollama": Surface(
        "/api/chat", _ollama_body, _ollama_whole, _ollama_stream, lambda schema: {"format": schema}, lines=True
    ),
}

PROMPTS = {
    "completions": Surface(
        "/v1/completions",
        _completion_body,
        _completion_whole,
        _completion_stream,
        lambda schema: {"structured_outputs": {"json": schema}},
    ),
    "generate": Surface(
        "/api/generate",
        _generate_body,
        _generate_whole,
        _generate_stream,
        lambda schema: {"format": schema},
        lines=True,
    ),
}
"""Those that go on from a text: without turns, and without tools."""
