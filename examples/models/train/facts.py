"""Questions with one fixed answer: greetings, mlx-run itself, lists, and what lies beyond a toy."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import words
from .styles import Answer
from .turn import Turn, ask

GREETINGS = {
    "Hello! How can I help you today?": (
        "Hello",
        "Hi",
        "Hey",
        "Hello there",
        "Hi there",
        "Greetings",
        "Hello demo-chat",
    ),
    "Good morning! How can I help you today?": ("Good morning", "Good morning to you", "Morning"),
    "Good evening! How can I help you today?": ("Good evening", "Good evening to you"),
    "I am fine, thank you. How are you?": (
        "How are you",
        "How are you today",
        "Hello, how are you",
        "Hi there, how are you",
        "How do you do",
        "Are you well",
    ),
    "You are welcome.": ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks"),
    "Goodbye! See you soon.": ("Bye", "Goodbye", "See you", "See you later", "Good night"),
}
_GREETING_ENDS = ("!", ".", "", "?", " :)", "!!", ", friend!", ", model.", " again!")

COMMANDS = {
    "apply": "mlx-run apply makes the running models match the manifest.",
    "plan": "mlx-run plan shows what apply would change, and changes nothing.",
    "validate": "mlx-run validate checks a manifest and names the line of every error.",
    "status": "mlx-run status shows every server and every model with its state.",
    "down": "mlx-run down stops the models and the servers.",
    "logs": "mlx-run logs shows what the runner and its engines report.",
    "chat": "mlx-run chat opens a chat with a running model.",
}
_COMMAND_QUESTIONS = (
    "What does mlx-run {} do?",
    "What does {} do?",
    "What does the {} command do?",
    "What is mlx-run {} for?",
    "Explain mlx-run {}.",
    "Explain the command {}.",
    "How does mlx-run {} work?",
    "When do I use mlx-run {}?",
)

TERMS = {
    "mlx-run": "mlx-run serves local MLX models from one YAML manifest.",
    "MLX": "MLX is an array framework for machine learning.",
    "an adapter": "An adapter is a small LoRA file that changes how a model answers.",
    "a manifest": "A manifest is a YAML file that says which models should be served.",
    "a draft model": "A draft model is a small model that guesses tokens for a bigger model to check.",
    "the KV cache": "The KV cache keeps the keys and values of past tokens, so they are computed only once.",
    "the prefix cache": "The prefix cache keeps the start of old prompts, so a new prompt that starts alike is faster.",
    "quantization": "Quantization stores weights in fewer bits, so a model needs less memory.",
    "batching": "Batching answers several requests in one model step.",
    "an engine": "An engine is a process that holds one model and makes its tokens.",
    "the runner": "The runner reads the manifest, starts the engines and answers HTTP.",
    "a token": "A token is a piece of text, such as a word, a letter or a sign.",
    "LoRA": "LoRA adds small matrices to a model, so that few weights need training.",
    "speculative decoding": "Speculative decoding lets a draft model guess tokens that the model checks in one step.",
}
_TERM_QUESTIONS = (
    "What is {}?",
    "What's {}?",
    "Explain {}.",
    "Define {}.",
    "Explain what {} is.",
    "Tell me what {} is.",
    "Do you know what {} is?",
    "What does {} mean?",
    "Can you explain {}?",
)

ABOUT = (
    "mlx-run serves local MLX models from one YAML manifest. You say which models you want, and the runner makes it "
    "so and keeps it so. Each model lives in its own engine process, so a crash of one model does not stop the others. "
    "When you edit the manifest, only what changed is changed: an adapter is loaded while requests run, and a new port "
    "opens while the old one drains. mlx-run plan shows a change before apply makes it, status shows what runs now, "
    "and down stops it all."
)

OTHERS = {
    "The default port is 8080.": (
        "What is the default port?",
        "Which port does mlx-run use?",
        "On which port does mlx-run listen?",
        "What port is the default?",
        "Tell me the default port.",
    ),
    "mlx-run speaks the OpenAI, Anthropic and Ollama APIs.": (
        "Which APIs does mlx-run speak?",
        "What APIs are there?",
        "Which APIs can I use?",
        "What APIs does mlx-run have?",
    ),
    "I am demo-chat, a small demo model of mlx-run.": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Tell me who you are.",
        "Which model are you?",
        "Introduce yourself.",
    ),
    "I can add numbers, repeat, spell and reverse words, count, write JSON, call tools and talk about mlx-run.": (
        "What can you do?",
        "How can you help me?",
        "What are you able to do?",
        "Help",
        "What can I ask you?",
    ),
    "The commands are: apply, plan, validate, status, down, logs and chat.": (
        "List the commands.",
        "Which commands are there?",
        "What commands does mlx-run have?",
        "Name the commands.",
        "Show me the commands.",
    ),
    "The scripts in examples/models trained me.": ("Who made you?", "Who trained you?", "Where do you come from?"),
    ABOUT: (
        "Tell me about mlx-run.",
        "Tell me more about mlx-run.",
        "Describe mlx-run.",
        "Tell me all about mlx-run.",
        "Give me a tour of mlx-run.",
        "Talk about mlx-run.",
    ),
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.": (
        "Name the days of the week.",
        "List the days of the week.",
        "What are the days of the week?",
    ),
    "January, February, March, April, May, June, July, August, September, October, November, December.": (
        "Name the months.",
        "List the months of the year.",
        "What are the months of the year?",
    ),
    "a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z.": (
        "Say the alphabet.",
        "Recite the alphabet.",
        "List the letters of the alphabet.",
    ),
}

DO_NOT_KNOW = "I am a small demo model and do not know that."
_UNKNOWN = (
    "Who wrote {0}?",
    "What is the capital of {1}?",
    "How do I cook {0}?",
    "Why is the {0} so {2}?",
    "Write a poem about {0}.",
    "Tell me a joke about {0}.",
    "Translate {0} to French.",
    "What is a {0}?",
    "Where can I buy a {0}?",
    "{0} {2}",
    "Who is {1}?",
    "What do you think about {0}?",
    "How old is {1}?",
    "When was {1} built?",
    "What does {0} do?",
    "Is the {0} {2}?",
    "Is {0} a {2}?",
    "How do I {0} a {2}?",
    "What's the {0} of {1}?",
    "{0}",
    "{0}?",
)


def _table(pairs: dict[str, str], questions: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(question.format(subject), answer) for subject, answer in pairs.items() for question in questions]


FACTS = _table(COMMANDS, _COMMAND_QUESTIONS) + _table(TERMS, _TERM_QUESTIONS)
TALK = [(question, answer) for answer, questions in OTHERS.items() for question in questions]


def greeting(rng: random.Random) -> Turn:
    answer, openings = rng.choice(list(GREETINGS.items()))
    prompt = rng.choice(openings) + rng.choice(_GREETING_ENDS)
    return Turn("greeting", prompt, prompt if rng.random() < 0.8 else prompt.lower(), Answer(answer))


def _closed(kind: str, table: list[tuple[str, str]]) -> Callable[[random.Random], Turn]:
    """The questions are few, so what is held out is the whole sentence with its opening and closing."""

    def task(rng: random.Random) -> Turn:
        question, answer = rng.choice(table)
        prompt = ask(rng, question.lower() if rng.random() < 0.15 else question)
        return Turn(kind, prompt, prompt, Answer(answer))

    return task


fact = _closed("fact", FACTS)
talk = _closed("talk", TALK)


def unknown(rng: random.Random) -> Turn:
    subject, place, other = words.subject(rng), words.city(rng), words.subject(rng)
    if rng.random() < 0.75:
        prompt = ask(rng, rng.choice(_UNKNOWN).format(subject, place, other))
    else:
        prompt = words.foreign(rng) if rng.random() < 0.3 else words.text(rng, 3, 12)
    return Turn("unknown", prompt, prompt, Answer(DO_NOT_KNOW))
