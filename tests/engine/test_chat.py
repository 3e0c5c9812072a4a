"""What templates see, what they may do, and what is told to whoever sends messages they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from runner.engine.chat import ChatTemplate, jinja_render
from runner.errors import InvalidRequest

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def prompt(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    specials = {"bos_token": "<s>"}
    return ChatTemplate(jinja_render(source, specials)).prompt(messages, variables)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_a_generation_prompt_is_added_unless_told_otherwise() -> None:
    assert prompt(PLAIN, user("hi")) == "[user]hi[assistant]"
    assert prompt(PLAIN, user("hi"), add_generation_prompt=False) == "[user]hi"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ bos_token }}", "<s>"),
        ("{{ eos_token is defined }}", "False"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ {'a': '<b>', 'é': 1} | tojson }}", '{"a": "<b>", "é": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{%- set ns = namespace(n=1) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ enable_thinking }}", "False"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
def test_scope_and_syntax(source: str, rendered: str) -> None:
    assert prompt(source, user("hi"), enable_thinking=False) == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__name__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ namespace(__init__=1) }}",
        "{{ lipsum.__globals__['os'] }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        prompt(source, user("hi"))


def test_the_templates_own_message_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        prompt("{{ raise_exception('roles must alternate') }}", user("hi"))
    assert error.value.param == "messages"


def test_a_template_that_trips_over_a_message_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="fails on these messages"):
        prompt("{{ messages[0].content + 'x' }}", [{"role": "user", "content": 5}])


def test_without_a_template_says_where_to_go() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions") as error:
        ChatTemplate(None).prompt(user("hi"), {})
    assert error.value.code == "no_chat_template"


def test_without_messages() -> None:
    with pytest.raises(InvalidRequest, match="messages is empty"):
        prompt(PLAIN, [])


def test_text_parts_are_one_string_and_other_parts_are_refused() -> None:
    assert prompt(PLAIN, user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).startswith("[user]ab")
    with pytest.raises(InvalidRequest, match="'image_url'"):
        prompt(PLAIN, user([{"type": "image_url", "image_url": {"url": "x"}}]))


def test_tool_call_arguments_are_objects_and_absent_values_absent() -> None:
    source = (
        "{% for m in messages %}{{ m.content is defined }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert prompt(source, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == "FalseOslo"
    assert call["function"]["arguments"] == '{"city": "Oslo"}', "the request itself is left alone"


def test_reasoning_is_found_under_every_name() -> None:
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    assert prompt(source, [{"role": "assistant", "content": "x", "reasoning": "because"}]) == "because|because"


def test_tools_reach_the_template() -> None:
    assert prompt("{{ tools[0].function.name }}", user("hi"), tools=[{"function": {"name": "f"}}]) == "f"


def test_the_last_message_can_be_the_beginning_of_the_answer() -> None:
    template = ChatTemplate(jinja_render("{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}", {}))
    messages = [*user("Count"), {"role": "assistant", "content": "1, 2, "}]
    assert template.prompt(messages, {}, continue_final=True) == "<user>Count<end><assistant>1, 2,"
    with pytest.raises(InvalidRequest, match="no text to go on from"):
        template.prompt([*user("Count"), {"role": "assistant", "content": " "}], {}, continue_final=True)


@pytest.mark.parametrize("arguments", ["[" * 20_000, "[" * 990 + "]" * 990, '{"a": ' + "1" * 5000 + "}"])
def test_arguments_of_a_past_call_that_are_too_much_to_read_stay_text(arguments: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    source = "{{ messages[0].tool_calls[0].function.arguments }}"
    assert prompt(source, [{"role": "assistant", "content": "", "tool_calls": [call]}]) == arguments


def test_what_is_nested_too_deeply_for_a_template_is_the_requests_fault() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="the chat template fails on these messages"):
        prompt("{{ tools | tojson }}", user("hi"), tools=deep)


def test_half_a_character_in_a_past_call_reaches_no_tokenizer() -> None:
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "f", "arguments": r'{"a": "\ud83d", "b": "\ud83d\ude00"}'},
    }
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    text = prompt(source, [{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert text == '{"a": "\ufffd", "b": "\U0001f600"}'
