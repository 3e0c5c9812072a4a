"""What the admin API changed, written into the files: exactly that, with comments and order, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.errors import ManifestError, RunnerError
from runner.manifest.adopt import adopt
from runner.manifest.drift import NO_CHANGES, Changes, load_adapter, load_model, unload_adapter, unload_model
from runner.manifest.load import load_manifest

BASE = """\
# yaml-language-server: $schema=…
name: dev  # mine
servers:
  lm: {port: 8080, models: [chat, embed], apis: [openai, admin]}
  all: {port: 8081}
models:
  # the one that answers
  chat:
    source: ./chat
    adapters:
      pirate: ./pirate  # arr
      sql: {source: ./sql, scale: 2}
  embed: {source: ./embed, x-note: kept}

x-end: yes it is  # the last line
"""
DECLARED = {"chat": ["pirate", "sql"], "embed": ()}


def written(tmp_path: Path, changes: Changes, *texts: str) -> list[str]:
    paths = [tmp_path / f"{n}.yaml" for n in range(len(texts) or 1)]
    for path, text in zip(paths, texts or (BASE,), strict=True):
        path.write_text(text)
    after = {file.path: file.after for file in adopt(paths, {"PORT": "1"}, changes)}
    for path in paths:
        path.write_text(after.get(path, path.read_text()))
    load_manifest(paths, {"PORT": "1"})
    return [path.read_text() for path in paths]


def edit(*steps: tuple[Any, ...]) -> Changes:
    changes = NO_CHANGES
    for step, *rest in steps:
        changes = step(changes, DECLARED, *rest)
    return changes


def test_a_model_and_adapters(tmp_path: Path) -> None:
    changes = edit(
        (load_model, "new", {"source": "./costs $5", "kv_cache": {"max_context": 64}}, ("lm",)),
        (load_adapter, "new", "a", {"source": "./a"}),
        (load_adapter, "chat", "loud", {"source": "./shout", "scale": 3.0}),
        (unload_adapter, "chat", "pirate"),
    )
    expected = BASE.replace("[chat, embed]", "[chat, embed, new]").replace("      pirate: ./pirate  # arr\n", "")
    expected = expected.replace("scale: 2}\n", "scale: 2}\n      loud:\n        source: ./shout\n        scale: 3.0\n")
    added = '  new:\n    source: "./costs $$5"\n    kv_cache: {max_context: 64}\n    adapters: {a: ./a}\n'
    expected = expected.replace("x-note: kept}\n", "x-note: kept}\n" + added)
    assert written(tmp_path, changes) == [expected]


def test_a_model_that_rests_is_taken_out_everywhere(tmp_path: Path) -> None:
    over = "servers: {lm: {models: [embed, chat]}}\nmodels: {embed: {aliases: [e]}, chat: {aliases: [c]}}\n"
    base, after = written(tmp_path, edit((unload_model, "embed")), BASE, over)
    assert base == BASE.replace(", embed]", "]").replace("  embed: {source: ./embed, x-note: kept}\n", "")
    assert after == "servers: {lm: {models: [chat]}}\nmodels: {chat: {aliases: [c]}}\n"


def test_a_model_of_an_overlay_gets_its_adapter_in_the_first_file(tmp_path: Path) -> None:
    """Its path is relative to that."""
    over = "models: {more: {source: ./more}}\n"
    changes = load_adapter(NO_CHANGES, {"more": ()}, "more", "p", {"source": "./p"})
    base, after = written(tmp_path, changes, BASE, over)
    assert after == over
    added = "  more:\n    adapters: {p: ./p}\n"
    assert base == BASE.replace("x-note: kept}\n", "x-note: kept}\n" + added)


@pytest.mark.parametrize(
    ("text", "changes", "why"),
    [
        (BASE, edit((unload_model, "chat"), (unload_model, "embed")), "empty"),
        (
            BASE.replace("adapters:\n", "default_adapter: pirate\n    adapters:\n"),
            edit((unload_adapter, "chat", "pirate")),
            "pirate",
        ),
        (
            BASE.replace("{source: ./embed, x-note: kept}", "&e {source: ./embed}\n  more: {<<: *e}"),
            edit((unload_model, "embed")),
            "embed",
        ),
        (BASE.replace("embed:", "new:").replace("embed]", "new]"), edit((load_model, "new", {"source": "./n"})), "new"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, text: str, changes: Changes, why: str) -> None:
    path = tmp_path / "dev.yaml"
    path.write_text(text)
    with pytest.raises(RunnerError, match=why) as caught:
        adopt([path], {}, changes)
    assert "Nothing was written" in caught.value.hint
    assert path.read_text() == text


def test_a_file_that_is_wrong_by_now_says_so(tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_text(BASE.replace("port: 8081", "prt: 8081"))
    with pytest.raises(ManifestError, match="prt"):
        adopt([path], {}, edit((unload_model, "embed")))


def test_references_stay_as_they_are_written(tmp_path: Path) -> None:
    text = BASE.replace("port: 8081", 'port: "${PORT}"')
    (after,) = written(tmp_path, edit((unload_model, "embed")), text)
    assert 'port: "${PORT}"' in after
