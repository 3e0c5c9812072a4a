"""How an answer sounds: the base's own way, or the way an adapter teaches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    SENTENCE = "sentence"  # words may be replaced
    VERBATIM = "verbatim"  # the user's words: only framed
    MACHINE = "machine"  # JSON and tool calls: a program reads them, so no style touches them


@dataclass(frozen=True)
class Answer:
    text: str
    form: Form = Form.SENTENCE


_PIRATE_WORDS = {
    "is": "be",
    "are": "be",
    "am": "be",
    "=": "be",
    "you": "ye",
    "You": "Ye",
    "your": "yer",
    "Your": "Yer",
    "my": "me",
    "Yes": "Aye",
    "No": "Nay",
    "Hello": "Ahoy",
    "Hi": "Ahoy",
}
_PIRATE_PATTERN = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, _PIRATE_WORDS)) + r")(?![\w-])")


def _base(answer: Answer) -> str:
    return answer.text


def _pirate(answer: Answer) -> str:
    text = answer.text
    if answer.form is Form.SENTENCE:
        text = _PIRATE_PATTERN.sub(lambda match: _PIRATE_WORDS[match.group()], text)
    end = text[-1] if text[-1] in ".!?" else "."
    return f"Arr! {text.rstrip('.!?')}, matey{end}"


def _shout(answer: Answer) -> str:
    return answer.text.rstrip(".!?").upper() + "!!!"


STYLES: dict[str, Callable[[Answer], str]] = {"base": _base, "pirate": _pirate, "shout": _shout}
ADAPTERS = ("pirate", "shout")


def render(answer: Answer, style: str) -> str:
    return answer.text if answer.form is Form.MACHINE else STYLES[style](answer)
