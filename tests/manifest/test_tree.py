"""A tree is the document's data, and knows where each key and value stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ManifestError
from runner.manifest.fill import fill
from runner.manifest.inputs import Inputs
from runner.manifest.source import Source
from runner.manifest.tree import Tree, dotted
from runner.manifest.walk import MAX_DEPTH, read_tree

ENV = {"NAME": "dev"}


def _tree(text: str) -> Tree:
    tree = read_tree(Source("dev.yaml", Path("/nowhere/dev.yaml"), text))
    fill(tree, ENV, Inputs())
    return tree


def _places(text: str) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Dotted path → ((line, column) of the key, of the value)."""
    tree = _tree(text)
    return {
        dotted(path): ((tree.keys[path].line, tree.keys[path].column), (place.line, place.column))
        for path, place in tree.values.items()
        if path in tree.keys
    }


def _error(text: str) -> tuple[int, int, str]:
    with pytest.raises(ManifestError) as caught:
        _tree(text)
    first = caught.value.diagnostics[0]
    return first.line, first.column, first.message


def test_places_of_keys_and_values() -> None:
    text = (
        "# first\nname: dev\nservers:\n  lm: {port: 8080,\n       host: 'a'}\nmodels:\n  chat:\n    aliases:\n    - x\n"
    )
    assert _places(text) == {
        "name": ((2, 1), (2, 7)),
        "servers": ((3, 1), (4, 3)),
        "servers.lm": ((4, 3), (4, 7)),
        "servers.lm.port": ((4, 8), (4, 14)),
        "servers.lm.host": ((5, 8), (5, 14)),
        "models": ((6, 1), (7, 3)),
        "models.chat": ((7, 3), (8, 5)),
        "models.chat.aliases": ((8, 5), (9, 5)),
    }
    assert _tree(text).values["models", "chat", "aliases", 0][1:] == (9, 7)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_columns_count_characters_and_lines_count_all_line_breaks(line_break: str) -> None:
    text = line_break.join(["größe: 1", "模型: {'😀': [a, b]}", "last: x"])
    places = _places(text)
    assert places["模型.😀"] == ((2, 6), (2, 11))
    assert places["last"] == ((3, 1), (3, 7))
    assert _tree(text).sources[0].excerpt(3) == "last: x"


def test_dotted() -> None:
    assert dotted(("models", "llama-3.2", "aliases", 0)) == "models.llama-3.2.aliases[0]"
    assert dotted(()) == ""


def test_the_nearest_place_above_stands_for_what_is_not_there() -> None:
    tree = _tree("a:\n  b: 1\n")
    assert tree.place(("a", "c", "d"))[1:] == (2, 3)
    assert tree.place(("x",))[1:] == (1, 1)
    assert tree.place(("a", "b"), key=True)[1:] == (2, 3)


def test_anchors_and_merge_keys() -> None:
    text = """
base: &base {port: 1, host: a}
more: &more {host: b, x: 1}
one: {<<: *base, port: 2}
two: {port: 3, <<: [*more, *base]}
three: {"<<": 4}
four: *base
nested: &nested {<<: *base, y: 5}
five: {<<: *nested, z: 6}
"""
    data = _tree(text).data
    assert data["one"] == {"port": 2, "host": "a"}
    assert data["two"] == {"port": 3, "host": "b", "x": 1}
    assert data["three"] == {"<<": 4}
    assert data["four"] == {"port": 1, "host": "a"}
    assert data["five"] == {"port": 1, "host": "a", "y": 5, "z": 6}
    assert _places(text)["one.host"] == ((2, 23), (2, 29))
    data["four"]["port"] = 9
    assert data["base"]["port"] == 1


def test_keys_are_texts() -> None:
    assert _tree("{10: a, true: b, null: c, 1.0: d}").data == {"10": "a", "true": "b", "null": "c", "1.0": "d"}


def test_tags_that_say_what_is_so_anyway() -> None:
    data: Any = _tree("{a: !!str 12, b: !!int '12', c: !!null '', d: !!map {}, e: !!seq []}").data
    assert data == {"a": "12", "b": 12, "c": None, "d": {}, "e": []}


def test_quoted_and_block_texts_stay_text() -> None:
    assert _tree("a: '8080'\nb: \"true\"\nc: |\n  12\nd: ''\n").data == {"a": "8080", "b": "true", "c": "12\n", "d": ""}


def test_variables_are_noted_with_their_text() -> None:
    tree = _tree("a: ${NAME}\nb: ${NOPE}\nc: $$x\n")
    assert tree.data == {"a": "dev", "b": "${NOPE}", "c": "$x"}
    assert {dotted(path): tuple(v) for path, v in tree.variables.items()} == {
        "a": ("${NAME}", "dev"),
        "c": ("$$x", "$x"),
    }
    assert [p.path for p in tree.problems] == [("b",)]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a: 1\na: 2\n", 2, 1),
        ("a: {b: 1, c: 2, b: 3}\n", 1, 17),
        ("a:\n  - x: 1\n    'x': 2\n", 3, 5),
        ("a: 1\n<<: {b: 1}\n<<: {c: 1}\n", 3, 1),
    ],
)
def test_duplicate_keys(text: str, line: int, column: int) -> None:
    found = _error(text)
    assert found[:2] == (line, column)
    assert "is given twice" in found[2]


def test_all_duplicates_are_told_at_once() -> None:
    with pytest.raises(ManifestError) as caught:
        _tree("a: 1\na: 2\nb: {c: 1, c: 1, c: 1}\n")
    assert [(d.line, d.column) for d in caught.value.diagnostics] == [(2, 1), (3, 11), (3, 17)]


def test_bombs() -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for name, of in zip("bcdefghij", "abcdefghi", strict=True):
        laughs += f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n"
    assert _error(laughs)[2] == "the aliases (*) expand to more than a manifest can have"
    merges = "a: &a {k: 1}\n"
    for name, of in zip("bcdefghij", "abcdefghi", strict=True):
        merges += f"{name}: &{name} {{<<: [{', '.join([f'*{of}'] * 10)}]}}\n"
    assert _error(merges)[2] == "the aliases (*) expand to more than a manifest can have"


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {<<: *a}\n", "a: &a {<<: [{<<: *a}]}\n"])
def test_an_alias_inside_itself(text: str) -> None:
    assert _error(text)[2] == "an alias (*) cannot be inside what it stands for"


def test_depth() -> None:
    deepest = MAX_DEPTH - 1
    assert _tree("a: " + "[" * deepest + "]" * deepest).data
    assert _error("a: " + "[" * 40 + "]" * 40)[2] == f"is nested more than {MAX_DEPTH} deep"


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "a: " + "[" * 500_000 + "]" * 500_000, "- " * 500_000, "{a: " * 300_000]
)
def test_depth_that_would_overflow_the_c_stack(text: str) -> None:
    assert _error(text)[2] == "is nested too deeply"


def test_what_is_no_yaml_character() -> None:
    assert _error("a: 1\nbö: \x07\n") == (2, 5, "the control character U+0007 is not allowed in YAML")


PURE = """
import sys, yaml
del yaml.CSafeLoader
from pathlib import Path
from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.syntax import SyntaxLoader
assert issubclass(SyntaxLoader, yaml.SafeLoader)
loaded = load_manifest(Path(sys.argv[1]), {"PORT": "8081"})
print(loaded.manifest.servers["lm"].port, loaded.at(("models", "chat", "source"), "").line)
for text in ("a: [1\\n", "\\ta: 1\\n", "a: b: c\\n", "a: \\x07\\n", "[" * 5000, "a: *b\\n"):
    Path(sys.argv[1]).write_text(text)
    try:
        load_manifest(Path(sys.argv[1]), {})
    except ManifestError as error:
        print(len(error.diagnostics), error.diagnostics[0].message)
"""


def test_without_libyaml(tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_text('name: x\nservers: {lm: {port: "${PORT}"}}\nmodels:\n  chat:\n    source: ./m\n')
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PURE, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.splitlines() == [
        "8081 5",
        '1 a list that began with "[" goes on here without "," or "]"',
        "1 a tab is used for indentation",
        '1 a ":" is not allowed here',
        "1 the control character U+0007 is not allowed in YAML",
        "1 is nested too deeply",
        "1 an alias (*) without its anchor (&)",
    ]
