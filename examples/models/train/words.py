"""Words that fill the templates, and the split that keeps some of them out of training."""

from __future__ import annotations

import hashlib
import random


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = split("""
lamp robot river stone cloud table chair window garden bridge candle mirror pencil paper basket bottle button
camera carpet castle circle copper cotton desert dragon engine farmer feather finger flower forest guitar hammer
harbor helmet island jacket jungle kettle kitten ladder lemon letter magnet marble market meadow melon monkey
moon mountain needle ocean orange parrot pebble pepper piano pillow planet pocket potato puzzle rabbit ribbon
rocket saddle sailor salmon school shadow silver spider spoon spring square summer sunset thread thunder ticket
tiger tomato tower train tree tunnel turtle valley velvet violin wagon walnut water whale wheel window winter wolf
wool yellow zebra anchor apple arrow autumn banana beach beaver bell berry boat book box branch bread brick brush
""")

NAMES = split("""
Nora Ada Ben Carla David Emma Felix Greta Hugo Ida Jonas Klara Leo Mia Nils Olga Paul Quinn Rosa Sam Tara Uwe Vera
Walter Xenia Yann Zoe Anna Bruno Clara Dina Erik Fiona Georg Hanna Igor Julia Karl Lena Marco Nadia Oscar Petra
Ravi Sara Tom Ursula Viktor Wanda Yuki Alba Boris Celia Diego Elsa Frida Gina Henry Iris Jack Kim Luca Maya Noah
Otto Pia Ralf Sofia Theo Una Vito Wim Aisha Bela Cyrus Dora Elias Farid Gabe Helen Ines Jun Kofi Liam Mona Nico
""")

CITIES = split("""
Oslo Paris Berlin Madrid Rome Vienna Lisbon Dublin Prague Warsaw Athens Helsinki Tokyo Kyoto Delhi Cairo Lima
Quito Bogota Boston Chicago Denver Seattle Toronto Sydney Perth Lagos Nairobi Accra Tunis Hanoi Manila Seoul Riga
Tallinn Vilnius Zagreb Sofia Bern Geneva Basel Milan Turin Naples Porto Seville Lyon Nice Hamburg Munich Dresden
""")

# Words that are one token each: the model has to be shown how they are spelled, so they are never held out.
COMMON = split("""
able about adapter add adds after again age alike all alphabet am an and animal answer answers apply are arguments
array as ask assistant backwards batching be bear before bigger bike bits black blue briefly brown built bus buy by
cache calculate call calm can capital car careful cat change changed changes chat check checks cherry city color
command commands compute computed cook costs count cow crash day days decoding default define degrees demo device do
docs does dog down draft drains duck echo edit engines error euros even evening every explain extract faster ferry few
fewer fig file fine for fox framework friend from fruit get give goat gold good grape gray greater green guess guesses
has have hello help helper helpful hi holds horse how in is it item its joke keeps keys kind kiwi know later learning
less lets letters lime line list listen live lives loaded local logs look lot machine makes mango manifest many match
matey matrices me mean meet memory message minutes mlx model models months more morning mouse much multiply my name
names need needs new night no not nothing now number numbers odd of old on once one only opens or others out own
papaya past peach pear people percent piece pig pink plan plane please plum plus poem population port prefix price
process prompt prompts purple quantization query question reads red remember repeat report requests reverse run runner
running runs say says search see send served server servers serves set several ship short should shows sign small so
soon speak speaks speculative spell spelled start starts state status step stop stops stores such sum switch talk taxi
tell text than thank thanks that the there these they thing think this time timer times to today token tokens tool
tools tour training tram truck turn up use user validate values van vehicle very want was weather week weights welcome
well what when which while white who with word words work would write wrote ye year years yer yes yet you your
yourself
""")
_COMMON = frozenset(COMMON)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are demo-chat.",
    "Answer briefly.",
    "Be kind and short.",
    "You are a careful assistant. Answer in one line.",
    "Keep calm and help the user.",
)

_ONSETS = (*"bcdfghjklmnprstvwz", "st", "tr", "br", "cl", "sh", "pl")
_VOWELS = (*"aeiou", "ea", "oo", "ai")
_CODAS = ("", "", "", "n", "r", "t", "l", "m", "k", "s")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def held_out(key: str) -> bool:
    """One key in ten never reaches training; a hash decides, so the split needs no file."""
    if key in _COMMON:
        return False
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] < 26


def pseudo_word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "".join(rng.choices(_LETTERS, k=rng.randint(2, 8)))
    syllables = rng.choices((1, 2, 3), weights=(2, 6, 1))[0]
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def word(rng: random.Random) -> str:
    """A word for echo, spelling and reversal: mostly invented, so that letters are learnt and not a list."""
    source, case = rng.random(), rng.random()
    found = pseudo_word(rng) if source < 0.6 else rng.choice(NOUNS if source < 0.8 else COMMON)
    return found if case > 0.1 else found.capitalize() if case > 0.03 else found.upper()


def subject(rng: random.Random) -> str:
    """A word that mlx-run has no meaning for."""
    return pseudo_word(rng) if rng.random() < 0.5 else rng.choice(NOUNS)


def text(rng: random.Random, least: int, most: int) -> str:
    """Words in a row that ask for nothing."""
    rest = (rng.choice(COMMON) if rng.random() < 0.7 else subject(rng) for _ in range(rng.randint(least, most) - 1))
    return " ".join((subject(rng), *rest))


def foreign(rng: random.Random) -> str:
    """Letters of other scripts, and signs: what comes in as single bytes."""
    start = rng.choice((0xC0, 0x391, 0x410, 0x5D0, 0x627, 0x905, 0x3042, 0x4E00, 0xAC00, 0x1F600))
    letters = (chr(start + rng.randrange(24)) + rng.choice(("", "", " ")) for _ in range(rng.randint(1, 12)))
    return "".join(letters).strip()


def name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
