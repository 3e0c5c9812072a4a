"""An editor's view of manifests: the schema through a real yaml-language-server, as VS Code and others run it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from tests.manifest.language_server import Editor
from tests.manifest.npm import install

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "schemas" / "manifest.schema.json"
SETTINGS = json.loads(re.findall(r"settings\.json.*?```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0])
"""Those that README gives for VS Code."""
HEAD = f"# yaml-language-server: $schema={SCHEMA.as_uri()}\n"


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    modules = install(tmp_path_factory.mktemp("npm"), "yaml-language-server")
    with Editor(modules, tmp_path_factory.mktemp("workspace"), custom_tags=SETTINGS["yaml.customTags"]) as opened:
        yield opened


def place(text: str) -> tuple[str, int, int]:
    """A document, and where its cursor `|` was: line and column from 0."""
    before, after = dedent(text).split("|")
    lines = (HEAD + before).split("\n")
    return HEAD + before + after, len(lines) - 1, len(lines[-1])


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("|", {"name", "servers", "models", "memory", "defaults"}),
        (
            "models:\n  chat:\n    source: org/name\n    |\n",
            {"adapters", "kv_cache", "batching", "draft", "generation"},
        ),
        ("models:\n  chat:\n    source: org/name\n    kv_cache:\n      |\n", {"bits", "max_context", "prefix_cache"}),
        ("models:\n  chat:\n    source: org/name\n    kv_cache:\n      bits: |\n", {"8", "4"}),
        ("servers:\n  lm:\n    port: 8080\n    |\n", {"host", "apis", "auth", "cors", "models"}),
        ("servers:\n  lm:\n    port: 8080\n    apis: [|]\n", {"openai", "anthropic", "ollama"}),
        (
            "models:\n  chat:\n    source: org/name\n    adapters:\n      a:\n        |\n",
            {"source", "revision", "scale"},
        ),
    ],
)
def test_completion(editor: Editor, text: str, offered: set[str]) -> None:
    document, line, column = place(text)
    found = editor.completions(editor.open(document), line, column)
    assert set(found) >= offered
    for label in offered:
        if not label.isdigit() and found[label]["kind"] == 10:  # a property
            assert found[label]["documentation"], f"{label} is explained"


def test_completion_does_not_offer_what_is_there(editor: Editor) -> None:
    document, line, column = place("models:\n  chat:\n    source: org/name\n    aliases: [x]\n    |\n")
    assert not {"source", "aliases"} & set(editor.completions(editor.open(document), line, column))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("models:\n  chat:\n    sou|rce: org/name\n", "Hugging Face repository"),
        ("servers:\n  lm: {po|rt: 8080}\n", "TCP port to listen on"),
        ("models:\n  chat:\n    source: org/name\n    kv_cache: {max_con|text: 4096}\n", "The most tokens a request"),
        ("memory: {lim|it: 75%}\n", "The most that all engines together may use"),
    ],
)
def test_hover(editor: Editor, text: str, shown: str) -> None:
    document, line, column = place(text)
    assert shown in editor.hover(editor.open(document), line, column)


SOUND = "name: dev\nservers:\n  lm:\n    port: 8080\nmodels:\n  chat:\n    source: org/name\n"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    port: 8080", "    prot: 8080\n    port: 8080"),
        ("    port: 8080", "    port: 99999"),
        ("    port: 8080", "    port: '8080'"),
        ("    source: org/name", "    source: org/name\n    kv_cahe: {bits: 8}"),
        ("    source: org/name", "    source: org/name\n    kv_cache:\n      bits: 7"),
        ("    source: org/name", "    source: org/name\n    generation:\n      temperature: hot"),
        ("    source: org/name", "    source: org/name\n    aliases: gpt"),
        ("    source: org/name", "    source: org/name\n    batching: {max_rows: 0}"),
        ("name: dev", "name: Dev Box"),
        ("name: dev", "name: dev\nname: dev"),
    ],
)
def test_mistakes_are_underlined_where_validate_says(editor: Editor, tmp_path: Path, right: str, wrong: str) -> None:
    text = HEAD + SOUND.replace(right, wrong)
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as refused:
        load_manifest(path, {})
    ours = {(d.line - 1, d.column - 1) for d in refused.value.diagnostics}
    starts = [problem["range"]["start"] for problem in editor.problems(editor.open(text))]
    assert ours <= {(start["line"], start["character"]) for start in starts}


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [("    port: 8080", "    host: 127.0.0.1", "port"), ("    source: org/name", "    aliases: []", "source")],
)
def test_what_is_missing_is_named(editor: Editor, right: str, wrong: str, said: str) -> None:
    problems = editor.problems(editor.open(HEAD + SOUND.replace(right, wrong)))
    assert any(said in problem["message"] for problem in problems)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_our_own_manifests_are_not_underlined(editor: Editor, path: Path) -> None:
    text = path.read_text()
    here = text.replace("$schema=../schemas/", f"$schema={SCHEMA.parent.as_uri()}/", 1)
    assert here != text, "its first line names its schema"
    assert editor.problems(editor.open(here)) == []


def test_overlays_are_checked_too(editor: Editor) -> None:
    schema = (SCHEMA.parent / "overlay.schema.json").as_uri()
    text = "servers: {lm: {prot: 8080}}\nmodels: {quick: !reset }\n"
    problems = editor.problems(editor.open(f"# yaml-language-server: $schema={schema}\n{text}"))
    assert [problem["range"]["start"] for problem in problems] == [{"line": 1, "character": 15}]


def test_the_setting_that_readme_names(editor: Editor) -> None:
    """Without a first line: by `yaml.schemas`."""
    ((named, patterns),) = SETTINGS["yaml.schemas"].items()
    assert (ROOT / named).samefile(SCHEMA)
    editor.associate(SCHEMA, patterns[0])
    problems = editor.problems(editor.open("nam: dev\n", "mlx-run.dev.yaml"))
    assert any("nam" in problem["message"] for problem in problems)
