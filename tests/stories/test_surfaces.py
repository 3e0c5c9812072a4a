"""One question on every surface: the pieces of an answer joined are the answer, whatever is split between them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.stories.demo import HELD_OUT
from tests.stories.harness import Bench
from tests.stories.surfaces import PROMPTS, SURFACES, Answer, Surface

pytestmark = [pytest.mark.story, pytest.mark.mlx]

SPLIT = ["größe", "東京", "naïve", "🦜🦜", "Ελλάδα", "señor", "日本語テスト", "ärger über öl"]
"""Words that the demo model's tokenizer spells in bytes, so that characters are split over tokens; a schema has it say
them."""

Question = tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], str]
"""Messages, tools, stop strings, and a word to be said."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with every API."""
    bench = Bench(tmp_path_factory.mktemp("surfaces"))
    bench.write()
    text = bench.manifest.read_text()
    text = text.replace(f"{{port: {bench.port}}}", f"{{port: {bench.port}, apis: [openai, anthropic, ollama]}}")
    bench.save(text.replace("  demo-chat:\n", "  chat:\n"))
    with bench.serving(), httpx.Client(base_url=bench.url, timeout=60) as client:
        yield client
    bench.close()


def questions(count: int) -> list[Question]:
    """`count` different ones: what was held out of training, words in bytes, and answers that are stopped."""
    chance = random.Random(7)
    rows: list[Question] = [
        (row["messages"], row.get("tools") or [], [], "")
        for row in HELD_OUT
        if all(message["role"] != "tool" for message in row["messages"])
    ]
    words: list[Question] = [([{"role": "user", "content": f"Say {word}"}], [], [], word) for word in SPLIT]
    count_up = [{"role": "user", "content": "Count from 1 to 30."}]
    stops: list[Question] = [(count_up, [], [f" {n}, {n + 1}"], "") for n in range(4, 12)]
    tools = [row for row in rows if row[1]]
    rest = [row for row in rows if not row[1]]
    chance.shuffle(rest)
    return [*words, *stops, *tools[:12], *rest][:count]


def both(surface: Surface, client: httpx.Client, question: Question, seed: int) -> tuple[Answer, Answer]:
    messages, tools, stop, word = question
    body = surface.body(messages, tools, stop, seed) | (surface.form({"const": word}) if word else {})
    return surface.ask(client, body), surface.ask_streamed(client, body)


def check(surface: Surface, client: httpx.Client, count: int) -> None:
    asked = questions(count)
    assert len(asked) == count
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: both(surface, client, asked[n], n), range(count)))
    for (messages, _, stop, word), (whole, streamed) in zip(asked, answers, strict=True):
        assert streamed == whole, messages
        assert word in whole.text
        assert whole.tokens > 0
        if surface.stops:
            assert all(string not in whole.text for string in stop), "a stop string is never part of the text"
    calls = surface in SURFACES.values()
    assert any(whole.calls for whole, _ in answers) == calls, "some of the questions have to end in calls"


EVERY = {**SURFACES, **PROMPTS}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_pieces_joined_are_the_answer(served: httpx.Client, name: str) -> None:
    check(EVERY[name], served, 24)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(EVERY))
def test_pieces_joined_are_the_answer_for_200_questions(served: httpx.Client, name: str) -> None:
    check(EVERY[name], served, 200)


def test_all_surfaces_give_one_answer(served: httpx.Client) -> None:
    """Greedy, so that seeds do not matter: what differs is the wire only."""
    for row in [row for row in HELD_OUT if len(row["messages"]) == 1 and not row.get("tools")][:8]:
        bodies = {name: surface.body(row["messages"], [], [], 0) for name, surface in SURFACES.items()}
        for name, body in bodies.items():
            (body["options"] if name == "ollama" else body)["temperature"] = 0
        answers = {name: SURFACES[name].ask(served, body) for name, body in bodies.items()}
        assert len({answer.text for answer in answers.values()}) == 1, answers
        assert len({answer.tokens for answer in answers.values()}) == 1, answers


def test_usage_is_the_tokenizers_count(served: httpx.Client) -> None:
    from tokenizers import Tokenizer

    from tests.stories.harness import MODELS

    tokenizer = Tokenizer.from_file(str(MODELS / "demo-chat/tokenizer.json"))
    messages = [{"role": "user", "content": "Spell robot."}]
    counted = served.post("/v1/messages/count_tokens", json={"model": "chat", "messages": messages}).json()
    answer = served.post(
        "/v1/chat/completions", json={"model": "chat", "messages": messages, "temperature": 0, "max_tokens": 64}
    ).json()
    rendered = "<|bos|><|user|>Spell robot.<|end|><|assistant|>"
    prompt = len(tokenizer.encode(rendered, add_special_tokens=False).ids)
    assert counted["input_tokens"] == answer["usage"]["prompt_tokens"] == prompt
    text = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == len(tokenizer.encode(text, add_special_tokens=False).ids) + 1
