"""Edits of a file's text: what is meant, and not a character beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.manifest.edit import CannotEdit, add_item, drop_item, put, remove
from runner.manifest.source import Source
from runner.manifest.walk import read_tree


def source(text: str) -> Source:
    return Source("dev.yaml", Path("/nowhere/dev.yaml"), text)


ENTRY = {"source": "./b", "aliases": ["x", "on"], "kv_cache": {"max_context": 512}}
FLOW = "b: {source: ./b, aliases: [x, on], kv_cache: {max_context: 512}}"
BLOCK = "b:\n    source: ./b\n    aliases: [x, on]\n    kv_cache: {max_context: 512}\n"
WIDE = "b:\n      source: ./b\n      aliases: [x, on]\n      kv_cache: {max_context: 512}\n"
COMMENTED = "# head\nmodels:   # all of them\n  a: {source: ./a}  # the first\n"
DEEP = "models:\n    a:\n        source: ./a\n        # why\n        aliases:\n            - q  # a letter"
TEXT = "models:\n  a:\n    source: >-\n      ./a\n"

PUTS = {
    "block": (f"{COMMENTED}\n# below\nx: 1\n", f"{COMMENTED}  {BLOCK}\n# below\nx: 1\n"),
    "nested block, four wide, without an end of line": (DEEP, f"{DEEP}\n    {WIDE}"),
    "flow": ("models: {a: {source: ./a}}  # one\n", f"models: {{a: {{source: ./a}}, {FLOW}}}  # one\n"),
    "flow over lines": ("models: {\n  a: {s: 1}, # first\n}\n", f"models: {{\n  a: {{s: 1}}, {FLOW}, # first\n}}\n"),
    "nothing": ("models:  # none yet\nx: 1\n", f"models:  # none yet\n  {BLOCK}x: 1\n"),
    "null": ("models: null # none\n", f"models: {{{FLOW}}} # none\n"),
    "an empty mapping": ("models: {}\n", f"models: {{{FLOW}}}\n"),
    "no section": ("name: dev\n", f"name: dev\nmodels:\n  {FLOW}\n"),
    "a text in a block": (f"{TEXT}\n# end\n", f"{TEXT}  {BLOCK}\n# end\n"),
    "lines that end as on Windows": (
        "models:\r\n  a: {source: ./ä}\r\n",
        f"models:\n  a: {{source: ./ä}}\n  {BLOCK}".replace("\n", "\r\n"),
    ),
}


@pytest.mark.parametrize("form", PUTS)
def test_put(form: str) -> None:
    before, after = PUTS[form]
    assert put(source(before), ("models", "b"), ENTRY).text == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: {source: ./a}\n", "a: {source: ./a, adapters: {p: ./p}}\n"),
        ("a:\n  source: ./a\n", "a:\n  source: ./a\n  adapters:\n    p: ./p\n"),
        ("a:\n  adapters:\n  source: ./a\n", "a:\n  adapters:\n    p: ./p\n  source: ./a\n"),
        ("a:\n  adapters: {q: ./q}\n", "a:\n  adapters: {q: ./q, p: ./p}\n"),
        ("a: {adapters: , source: ./a}\n", "a: {adapters: {p: ./p} , source: ./a}\n"),
    ],
)
def test_put_further_down(before: str, after: str) -> None:
    assert put(source(before), ("a", "adapters", "p"), "./p").text == after


@pytest.mark.parametrize(
    "value", ["a b", "$HOME", "${X}", "0x10", "on", "null", "~", "é\u2028\n", '"', "- a", "", "#", "1:2"]
)
def test_texts_mean_themselves(value: str) -> None:
    after = put(source("m: {a: 1}\n"), ("m", value or "k"), [value, {"in": value}])
    assert read_tree(source(after.text)).data["m"][value or "k"] == [value, {"in": value}]


REMOVALS = {
    "the first of a block": ("m:\n  # about a\n  a: 1  # one\n  b: 2\n", "m:\n  # about a\n  b: 2\n"),
    "the last of a block": ("m:\n  b: 2\n  a:\n    c: 3\n\n# end\n", "m:\n  b: 2\n\n# end\n"),
    "the only one of a block": ("m:\n  a: 1\nn: 2\n", "m:\nn: 2\n"),
    "the first of a flow": ("m: {a: 1, b: 2} # x\n", "m: {b: 2} # x\n"),
    "the last of a flow": ("m: {b: 2, a: [1, 2]}\n", "m: {b: 2}\n"),
    "the only one of a flow": ("m: {a: 1}\n", "m: {}\n"),
}


@pytest.mark.parametrize("form", REMOVALS)
def test_remove(form: str) -> None:
    before, after = REMOVALS[form]
    assert remove(source(before), ("m", "a")).text == after


def test_items() -> None:
    block = "s:\n  models:\n    - a # first\n    - b\n  port: 1\n"
    assert add_item(source(block), ("s", "models"), "c").text == block.replace("- b\n", "- b\n    - c\n")
    assert drop_item(source(block), ("s", "models"), "a").text == block.replace("    - a # first\n", "")
    flow = "s: {models: [a, b], port: 1}\n"
    assert add_item(source(flow), ("s", "models"), "c").text == flow.replace("b]", "b, c]")
    assert drop_item(source(flow), ("s", "models"), "b").text == flow.replace(", b]", "]")
    assert drop_item(source(flow), ("s", "models"), "a").text == flow.replace("a, ", "")


@pytest.mark.parametrize(
    "text",
    [
        "base: &b {a: 1}\nm: *b\n",
        "base: &b {a: 1}\nm: {<<: *b}\n",
        "m: {a: &x 1}\nn: *x\n",
        "n: 1\n",
        "m: 1\n",
        "m: [a]\n",
        "- m\n",
    ],
)
def test_what_cannot_be_taken_away_alone_is_refused(text: str) -> None:
    with pytest.raises(CannotEdit):
        remove(source(text), ("m", "a"))


def test_what_is_there_is_not_replaced() -> None:
    for text in ("m: {a: 1}\n", "m: text\n", "m: [1]\n"):
        with pytest.raises(CannotEdit, match="is there already"):
            put(source(text), ("m", "a"), 2)
    with pytest.raises(CannotEdit, match="no list"):
        add_item(source("m: []\n"), ("m",), "a")
    with pytest.raises(CannotEdit, match="does not list"):
        drop_item(source("m: [b]\n"), ("m",), "a")
