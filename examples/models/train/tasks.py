"""Questions whose answer follows from the prompt by a rule."""

from __future__ import annotations

import json
import random

from . import words
from .styles import Answer, Form
from .turn import Turn, ask

_SUMS = (
    "What is {} + {}?",
    "What is {} plus {}?",
    "What's {} + {}?",
    "{} + {}",
    "{} plus {}",
    "{}+{}=?",
    "Add {} and {}.",
    "Calculate {} + {}.",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "Compute {}+{}.",
    "What is the sum of {} and {}?",
)
_ECHO = ("Repeat the word {}.", "Say {}.", "Say the word {}.", "Echo {}.", "Repeat: {}", "Echo: {}", "Say: {}")
_ECHO_MANY = ("Repeat after me: {}", "Repeat: {}", "Echo: {}", "Say: {}", "Say this: {}", "Repeat these words: {}")
_REVERSE = (
    "Reverse the word {}.",
    "Reverse {}.",
    "Spell {} backwards.",
    "Write {} backwards.",
    "What is {} in reverse?",
    "What is {} backwards?",
    "Reverse: {}",
)
_SPELL = ("Spell {}.", "Spell the word {}.", "How do you spell {}?", "How is {} spelled?", "Spell: {}", "Spell out {}.")
_COUNT = (
    "Count from {} to {}.",
    "Count up from {} to {}.",
    "Please count from {} to {}.",
    "List the numbers from {} to {}.",
    "Give me the numbers from {} to {}.",
)
_COUNT_TO = ("Count to {}.", "Count up to {}.", "Please count to {}.")
_CLASSES = {
    "an animal": words.split("cat dog horse cow pig goat duck mouse bear fox"),
    "a fruit": words.split("pear plum peach grape mango kiwi cherry fig lime papaya"),
    "a color": words.split("red blue green pink brown gray purple white black gold"),
    "a vehicle": words.split("car bus truck bike tram ship plane taxi van ferry"),
}
_COMPARE = {"greater": "greater", "less": "less", "bigger": "greater", "larger": "greater", "smaller": "less"}
_EXTRACT = {
    "name and age": ("{name} is {number} years old.", ("name", "age")),
    "name and city": ("{name} lives in {city}.", ("name", "city")),
    "item and price": ("The {word} costs {number} euros.", ("item", "price")),
    "name, age and city": ("{name} is {number} years old and lives in {city}.", ("name", "age", "city")),
    "name and item": ("{name} has a {word}.", ("name", "item")),
}
_EXTRACT_ASK = ("Extract the {} as JSON: {}", "Give me the {} as JSON: {}", "Write the {} as JSON: {}")


def addition(rng: random.Random) -> Turn:
    most = 99 if rng.random() < 0.8 else 999
    a, b = rng.randint(0, most), rng.randint(0, most)
    prompt = ask(rng, rng.choice(_SUMS).format(a, b))
    return Turn("sum", f"{min(a, b)}+{max(a, b)}", prompt, Answer(f"{a} + {b} = {a + b}."))


def echo(rng: random.Random) -> Turn:
    count = rng.choice((1, 1, 2, 3, 4))
    text = " ".join(words.word(rng) for _ in range(count))
    prompt = ask(rng, rng.choice(_ECHO if count == 1 else _ECHO_MANY).format(text))
    return Turn("echo", text, prompt, Answer(text, Form.VERBATIM))


def reverse(rng: random.Random) -> Turn:
    text = words.word(rng)
    prompt = ask(rng, rng.choice(_REVERSE).format(text))
    return Turn("reverse", text, prompt, Answer(text[::-1], Form.VERBATIM))


def spell(rng: random.Random) -> Turn:
    text = words.word(rng)
    prompt = ask(rng, rng.choice(_SPELL).format(text))
    return Turn("spell", text, prompt, Answer("-".join(text), Form.VERBATIM))


def count(rng: random.Random) -> Turn:
    low, high = sorted(rng.sample(range(1, 101), 2))
    if rng.random() < 0.5:
        low = 1
    question = rng.choice(_COUNT).format(low, high)
    if low == 1 and rng.random() < 0.4:
        question = rng.choice(_COUNT_TO).format(high)
    return Turn("count", f"{low}-{high}", ask(rng, question), Answer(", ".join(map(str, range(low, high + 1))) + "."))


def yes_no(rng: random.Random) -> Turn:
    return rng.choice((_parity, _comparison, _first_letter, _membership))(rng)


def _yes_no(rng: random.Random, key: str | None, question: str, true: bool, statement: tuple[str, str, str]) -> Turn:
    subject, verb, rest = statement
    text = f"Yes, {subject} {verb} {rest}." if true else f"No, {subject} {verb} not {rest}."
    return Turn("yes/no", key, ask(rng, question), Answer(text))


def _parity(rng: random.Random) -> Turn:
    number, word = rng.randint(0, 99), rng.choice(("even", "odd"))
    true = (number % 2 == 0) == (word == "even")
    question = rng.choice(("Is {} {}?", "Is {} an {} number?", "Is the number {} {}?")).format(number, word)
    return _yes_no(rng, f"parity {number}", question, true, (str(number), "is", word))


def _comparison(rng: random.Random) -> Turn:
    a, b, word = rng.randint(0, 99), rng.randint(0, 99), rng.choice(list(_COMPARE))
    meaning = _COMPARE[word]
    true = a > b if meaning == "greater" else a < b
    return _yes_no(rng, f"{a}?{b}", f"Is {a} {word} than {b}?", true, (str(a), "is", f"{meaning} than {b}"))


def _first_letter(rng: random.Random) -> Turn:
    text = words.word(rng).lower()
    letter = text[0] if rng.random() < 0.5 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    question = rng.choice(("Does {} start with {}?", "Does the word {} start with {}?")).format(text, letter)
    answer = f"Yes, {text} starts with {letter}." if text[0] == letter else f"No, {text} starts with {text[0]}."
    return Turn("yes/no", text, ask(rng, question), Answer(answer))


def _membership(rng: random.Random) -> Turn:
    home, wanted = rng.choice(list(_CLASSES)), rng.choice(list(_CLASSES))
    if rng.random() < 0.5:
        wanted = home
    thing = rng.choice(_CLASSES[home])
    # A thing's own class has to be seen once, so only the other classes can be held out.
    key = None if wanted == home else f"{thing} {wanted}"
    question = rng.choice(("Is {} {}?", "Is a {} {}?", "Is the {} {}?")).format(thing, wanted)
    return _yes_no(rng, key, question, wanted == home, (thing, "is", wanted))


def extract(rng: random.Random) -> Turn:
    fields, (sentence, keys) = rng.choice(list(_EXTRACT.items()))
    data = {"name": words.name(rng), "city": words.city(rng), "word": words.word(rng), "number": rng.randint(1, 99)}
    prompt = ask(rng, rng.choice(_EXTRACT_ASK).format(fields, sentence.format(**data)))
    source = {"name": "name", "city": "city", "item": "word", "age": "number", "price": "number"}
    # Without spaces, as grammars for structured output write it too.
    text = json.dumps({key: data[source[key]] for key in keys}, separators=(",", ":"))
    return Turn("json", str(data["word"] if keys[0] == "item" else data["name"]), prompt, Answer(text, Form.MACHINE))
