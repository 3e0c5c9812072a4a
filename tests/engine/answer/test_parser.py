"""Reasoning, calls and content, however the text is split."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from runner.engine.answer.conventions import Conventions, conventions, tool_convention
from runner.engine.answer.parser import parser_for
from runner.engine.answer.pieces import Piece

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
THINK = ("<think>", "</think>")
HERMES = Conventions(tool_convention("json_tools"), THINK)


def parsed(
    spoken: Conventions, text: str, *, seed: int = 0, tools: Any = TOOLS, prompt: str = "", cut: bool = False
) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of `text`, fed in random bits."""
    parser = parser_for(spoken, tools, prompt)
    if parser is None:
        return "", text, []
    chance = random.Random(seed)
    pieces: list[Piece] = []
    rest = text
    while rest:
        size = chance.randint(1, 1 + seed % 7)
        pieces += parser.feed(rest[:size])
        rest = rest[size:]
    pieces += parser.finish(cut=cut)
    return (
        "".join(p.text for p in pieces if p.kind == "reasoning"),
        "".join(p.text for p in pieces if p.kind == "content"),
        [(p.call.name, json.loads(p.call.arguments)) for p in pieces if p.call is not None],
    )


OSLO = ("get_weather", {"city": "Oslo"})
CALLS: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "json_tools": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>', [OSLO]),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        [OSLO],
    ),
    "mistral": ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]', [OSLO]),
    "pythonic": ('<|tool_call_start|>[get_weather(city="Oslo")]<|tool_call_end|>', [OSLO]),
    "glm47": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>",
        [OSLO],
    ),
    "kimi_k2": (
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
        ),
        [OSLO],
    ),
    "llama3": ('{"name": "get_weather", "parameters": {"city": "Oslo"}}', [OSLO]),
    "deepseek": (
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        ),
        [OSLO],
    ),
}


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize("seed", range(8))
def test_a_call_in_each_convention_however_it_is_split(name: str, seed: int) -> None:
    text, calls = CALLS[name]
    assert parsed(Conventions(tool_convention(name)), text, seed=seed) == ("", "", calls)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"llama3", "mistral"}))
def test_several_calls_and_the_text_before_them(name: str) -> None:
    text, calls = CALLS[name]
    found = parsed(Conventions(tool_convention(name)), f"Let me look.{text}\n{text}", seed=3)
    assert found == ("", "Let me look.", calls * 2)


def test_calls_without_markers_in_a_row() -> None:
    one = CALLS["llama3"][0]
    llama = Conventions(tool_convention("llama3"))
    assert parsed(llama, f"{one}; {one}", seed=2)[2] == [OSLO, OSLO]
    assert parsed(llama, f"[{one}, {one}]", seed=2)[2] == [OSLO, OSLO]
    assert parsed(llama, f"<|python_tag|>{one}", seed=2) == ("", "", [OSLO])
    assert parsed(llama, '{"answer": 42}', seed=1) == ("", '{"answer": 42}', [])
    assert parsed(llama, "A plain answer with a { in it.", seed=1)[1] == "A plain answer with a { in it."


def test_deepseeks_newer_form() -> None:
    text = (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )
    found = parsed(Conventions(tool_convention("deepseek")), text, seed=4)
    assert found[2] == [OSLO, ("get_weather", {"city": "Rome"})]


@pytest.mark.parametrize("seed", range(8))
def test_reasoning_comes_apart_from_the_answer(seed: int) -> None:
    text = "<think>\nTwo and two.\n\nSo four.\n</think>\n\nFour.\n"
    assert parsed(HERMES, text, seed=seed) == ("Two and two.\n\nSo four.", "Four.\n", [])
    opened = text.removeprefix("<think>\n")
    assert parsed(HERMES, opened, seed=seed, prompt="…<|assistant|><think>\n")[:2] == (
        "Two and two.\n\nSo four.",
        "Four.\n",
    )


def test_reasoning_then_a_call() -> None:
    text = f"<think>I need the weather: <tool_call> is how.</think>\n{CALLS['json_tools'][0]}"
    assert parsed(HERMES, text, seed=5) == ("I need the weather: <tool_call> is how.", "", [OSLO])
    llama = Conventions(tool_convention("llama3"), THINK)
    assert parsed(llama, f"<think>Hm.</think>\n\n{CALLS['llama3'][0]}", seed=5) == ("Hm.", "", [OSLO])


@pytest.mark.parametrize(
    "text", ["To think, write <think> first.", "< think", "<thin", "", "  \n", "a < b", "Use </think>!"]
)
def test_markers_that_are_quoted_or_begun_are_text(text: str) -> None:
    for seed in range(4):
        assert parsed(HERMES, text, seed=seed) == ("", text, [])


def test_reasoning_that_never_ends_is_reasoning() -> None:
    assert parsed(HERMES, "<think>On and on\n", seed=1, cut=True) == ("On and on\n", "", [])


def test_without_tools_a_call_is_text() -> None:
    text = CALLS["json_tools"][0]
    assert parsed(HERMES, text, tools=None) == ("", text, [])


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "get_weather", "arguments": {"city": "Oslo",}}',
        '{"name": "get_weather", "arguments": {"city": "Oslo"}',
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}}',
        '```json\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n```',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}',
    ],
)
def test_small_damage_is_mended(body: str) -> None:
    assert parsed(HERMES, f"<tool_call>{body}</tool_call>", seed=3) == ("", "", [OSLO])


@pytest.mark.parametrize(
    "body",
    ["", "get_weather(Oslo)", '{"name": 3}', '{"arguments": {}}', '{"name": "f", "arguments": [1]}', "[]", "null"],
)
def test_what_is_no_call_is_text_with_its_markers(body: str) -> None:
    text = f"Well: <tool_call>{body}</tool_call> and on"
    assert parsed(HERMES, text, seed=3) == ("", text, [])


def test_a_call_cut_short_is_text_since_its_arguments_are_not_known() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Os'
    assert parsed(HERMES, text, seed=3, cut=True) == ("", text, [])
    whole = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    assert parsed(HERMES, whole, seed=3) == ("", "", [OSLO]), "the model ended without the closing marker"


@pytest.mark.parametrize("seed", range(6))
def test_harmony(seed: int) -> None:
    text = (
        "<|channel|>analysis<|message|>The user asks for Oslo.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "One moment.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        "<|constrain|>json<|message|>"
        '{"city": "Oslo"}'
    )
    spoken = Conventions(harmony=True)
    assert parsed(spoken, text, seed=seed) == ("The user asks for Oslo.", "One moment.", [OSLO])
    final = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four."
    assert parsed(spoken, final, seed=seed) == ("Easy.", "Four.", [])
    assert parsed(spoken, "Just text.", seed=seed) == ("", "Just text.", [])


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_in_noise(seed: int) -> None:
    """Text made of bits of markers: without calls and reasoning, what goes in comes out."""
    chance = random.Random(seed)
    bits = ["<tool", "_call>", "</tool_call>", "<", ">", "{", '"name"', "x", "\n", "thin", "</think", " "]
    text = "a" + "".join(chance.choice(bits) for _ in range(60))
    spoken = Conventions(tool_convention("json_tools"), THINK)
    assert parsed(spoken, text, seed=seed) == ("", text, [])


@pytest.mark.parametrize(
    ("template", "vocabulary", "name"),
    [
        ("{% if tools %}<tool_call>{{ tool_call.name }}", (), "json_tools"),
        ("<tool_call>\n<function=example>", (), "qwen3_coder"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", (), "mistral"),
        ('<|eot_id|>{"name": x, "parameters": y}', (), "llama3"),
        ("<tool_call><arg_key>", (), "glm47"),
        (CALLS["deepseek"][0], (), "deepseek"),
        ("{% if tools %}", ("<|tool_call_start|>", "<|tool_call_end|>"), "pythonic"),
        ("no such thing", (), None),
    ],
)
def test_the_template_tells_the_convention(template: str, vocabulary: tuple[str, ...], name: str | None) -> None:
    found = conventions(template, vocabulary)
    assert (None if found.tools is None else found.tools.name) == name
    assert not found.harmony


def test_harmony_and_thinking_are_found() -> None:
    assert conventions("<|channel|>analysis<|message|>", ()).harmony
    assert conventions("", ("<think>", "</think>")).think == THINK
    assert conventions("{{ content.split('</think>') }}<think>", ()).think == THINK


@pytest.mark.parametrize(
    ("written", "read"),
    [(r"\ud83d", "\ufffd"), (r"a\udc00b", "a\ufffdb"), (r"\ud83d\ude00", "\U0001f600"), (r"\u00e9", "é")],
)
def test_half_a_character_does_not_leave_the_engine(written: str, read: str) -> None:
    """No message can carry one: encoding it would end every row of the batch."""
    text = f'<tool_call>{{"name": "get_weather", "arguments": {{"city": "{written}"}}}}</tool_call>'
    parser = parser_for(HERMES, TOOLS, "")
    assert parser is not None
    (piece,) = [*parser.feed(text), *parser.finish(cut=False)]
    assert piece.call is not None
    assert json.loads(piece.call.arguments.encode("utf-8")) == {"city": read}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_make_no_call(number: str) -> None:
    text = f'<tool_call>{{"name": "get_weather", "arguments": {{"days": {number}}}}}</tool_call>'
    assert parsed(HERMES, text) == ("", text, [])
