"""What the commands take, read off their argparse parsers: what shells complete by."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["words", "file", "runners", "models", "codes", "any"]
"""What a value is: one of some words, a file, what `mlx-run completion --words` lists, or nobody knows."""

_BY_DEST: Final[dict[str, Kind]] = {
    "code": "codes",
    "file": "file",
    "files": "file",
    "manifest": "file",
    "model": "models",
    "name": "runners",
    "out": "file",
    "output": "file",
}
_CONDITIONS: Final = ("ready", "sync")


@dataclass(frozen=True, slots=True)
class Value:
    """What follows an option, or stands by itself. `label` is what help calls it."""

    kind: Kind
    label: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One option by its spellings; `value` is None for a flag. `many`: it may be given again."""

    flags: tuple[str, ...]
    help: str
    value: Value | None
    many: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `operand` is what stands by itself, None for nothing; `many` times, or once."""

    name: str
    help: str
    options: tuple[Option, ...]
    operand: Value | None
    many: bool = False


def command_of(name: str, summary: str, parser: argparse.ArgumentParser) -> Command:
    """What a command's parser takes."""
    operands = [action for action in parser._actions if not action.option_strings]  # noqa: SLF001 - argparse has no other way
    first = operands[0] if operands else None
    return Command(
        name=name,
        help=summary,
        options=tuple(_options(parser)),
        operand=None if first is None else _value(first),
        many=first is not None and (first.nargs in ("*", "+") or len(operands) > 1),
    )


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way
        if action.option_strings and action.help != argparse.SUPPRESS:
            value = _value(action) if action.nargs != 0 else None
            many = action.dest == "files" or isinstance(action, argparse._AppendAction)  # noqa: SLF001
            yield Option(tuple(action.option_strings), _plain(action), value, many)


def _plain(action: argparse.Action) -> str:
    """The help on one line, as argparse prints it."""
    return " ".join((action.help or "").replace("%%", "%").split())


def _value(action: argparse.Action) -> Value:
    metavar = action.metavar[0] if isinstance(action.metavar, tuple) else action.metavar
    label = str(metavar or action.dest).lower()
    if action.choices is not None:
        return Value("words", label, tuple(map(str, action.choices)))
    if action.dest == "condition":
        return Value("words", label, _CONDITIONS)
    if metavar in ("SOURCE", "N"):
        return Value("any", label)
    return Value(_BY_DEST.get(action.dest, "any"), label)
