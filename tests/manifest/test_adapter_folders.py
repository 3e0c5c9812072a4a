"""`adapters: {from: …}`: which folders become adapters, and what is said of those that do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.manifest.advice import advise
from runner.manifest.load import Loaded, load_manifest

from .conftest import Load, Refused

CHAT = ("models", "chat", "adapters")


def _manifest(adapters: str) -> str:
    head = "name: dev\nservers: {main: {port: 8080}}\nmodels:\n  chat:\n    source: ./chat\n"
    return f"{head}    adapters: {adapters}\n"


def _folders(root: Path, *names: str, config: bool = True) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "notes.txt").touch()
        if config:
            (root / name / "adapter_config.json").write_text("{}")


def _adapters(loaded: Loaded) -> dict[str, str]:
    return {name: entry.source for name, entry in loaded.manifest.models["chat"].adapters.items()}


def _warned(loaded: Loaded) -> list[tuple[str, str]]:
    return [(d.code, d.message) for d in advise(loaded)]


def test_every_folder_that_holds_an_adapter_is_one_by_its_name(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "adapters", "sql", "pirate")
    (tmp_path / "adapters" / "README.md").touch()
    _folders(tmp_path / "adapters", ".hidden")
    loaded = load(_manifest("{from: ./adapters/*}"))
    assert _adapters(loaded) == {name: str(tmp_path / "adapters" / name) for name in ("pirate", "sql")}
    assert loaded.found == {(*CHAT, "pirate"), (*CHAT, "sql")}
    assert _warned(loaded) == []
    place = loaded.at((*CHAT, "sql", "source"), "x")
    assert (place.line, place.column, place.path) == (6, 22, "models.chat.adapters.sql.source")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("./a/*", {"one", "two"}),
        ("[./a/one, ./b/*]", {"one", "three"}),
        ("./*/t*", {"two", "three"}),
        ('"./a/[no]?e"', {"one"}),
        ('"${WHERE}/*"', {"three"}),
        ("", set()),
    ],
)
def test_patterns(patterns: str, names: set[str], load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "a", "one", "two")
    _folders(tmp_path / "b", "three")
    loaded = load(_manifest(f"{{from: {patterns} }}"), {"WHERE": str(tmp_path / "b")})
    assert _adapters(loaded).keys() == names


def test_a_folder_whose_own_name_looks_like_a_pattern(tmp_path: Path) -> None:
    root = tmp_path / "a [b] *"
    _folders(root / "adapters", "pirate")
    (root / "dev.yaml").write_text(_manifest("{from: ./adapters/*}"))
    assert list(_adapters(load_manifest(root / "dev.yaml", {}))) == ["pirate"]


def test_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    _folders(tmp_path / "over" / "adapters", "pirate")
    (tmp_path / "dev.yaml").write_text(_manifest("{from: ./adapters/*}"))
    (tmp_path / "over" / "prod.yaml").write_text("models: {chat: {adapters: {from: ./adapters/*}}}\n")
    loaded = load_manifest([tmp_path / "dev.yaml", tmp_path / "over" / "prod.yaml"], {})
    assert list(_adapters(loaded)) == ["pirate"]


def test_what_is_no_adapter_is_left_out_with_a_warning(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "adapters", "half", config=False)
    _folders(tmp_path / "adapters", "whole", "Pirate V2", "base", "from")
    _folders(tmp_path / "adapters" / "team", "nested")
    loaded = load(_manifest("{from: ./adapters/*}"))
    assert list(_adapters(loaded)) == ["whole"]
    assert _warned(loaded) == [
        ("W613", "the folder Pirate V2 is left out, for no adapter can have this name"),
        ("W613", "the folder base is left out, for no adapter can have this name"),
        ("W613", "the folder from is left out, for no adapter can have this name"),
        ("W612", "the folder half is no adapter (yet): it holds no adapter_config.json"),
        ("W612", "the folder team is no adapter (yet): it holds no adapter_config.json"),
    ]
    assert [d.hint for d in advise(loaded)][0::4] == [
        'use a-z, 0-9, ".", "_" and "-", such as pirate-v2',
        "its folders are: write team/*",
    ]


def test_no_match_is_a_warning(load: Load) -> None:
    loaded = load(_manifest("{from: [./none/*, ./not/here]}"))
    assert [(d.code, d.path) for d in advise(loaded)] == [
        ("W611", "models.chat.adapters.from[0]"),
        ("W611", "models.chat.adapters.from[1]"),
    ]


def test_a_listed_adapter_comes_before_one_that_is_found(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "adapters", "pirate", "sql")
    _folders(tmp_path / "more", "pirate", "sql")
    loaded = load(
        _manifest("{from: [./adapters/*, ./more/*], sql: {source: ./adapters/sql, scale: 5}, pirate: ./more/pirate}")
    )
    entries = loaded.manifest.models["chat"].adapters
    assert (entries["sql"].source, entries["sql"].scale) == ("./adapters/sql", 5)
    assert entries["pirate"].source == "./more/pirate"
    assert loaded.found == frozenset()
    assert [(code, message.rpartition(", ")[2]) for code, message in _warned(loaded)] == [
        ("W613", "for an adapter pirate is listed"),
        ("W613", "for an adapter sql is listed"),
    ]


def test_the_first_pattern_comes_before_others(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "a", "pirate")
    _folders(tmp_path / "b", "pirate")
    loaded = load(_manifest("{from: [./b/*, ./a/*]}"))
    assert _adapters(loaded) == {"pirate": str(tmp_path / "b" / "pirate")}
    assert _warned(loaded)[0][1].endswith("is left out, for an adapter pirate is found by a pattern above")


def test_a_found_adapter_can_be_the_default(load: Load, refused: Refused, tmp_path: Path) -> None:
    text = _manifest("{from: ./adapters/*}") + "    default_adapter: pirate\n"
    (found,) = refused(text)
    assert (found.code, found.path) == ("E302", "models.chat.default_adapter")
    _folders(tmp_path / "adapters", "pirate")
    assert load(text).manifest.models["chat"].default_adapter == "pirate"


def test_folders_are_seen_to_come_change_and_go(load: Load, tmp_path: Path) -> None:
    root = tmp_path / "teams"
    _folders(root / "a", "pirate")
    inputs = load(_manifest("{from: [./teams/*/*, ./later/*]}")).inputs
    states = [inputs.now()]
    assert states[0] == inputs

    def changed() -> bool:
        states.append(inputs.now())
        return states[-1] not in states[:-1]

    _folders(root / "b", "sql")
    assert changed()
    (root / "b" / "sql" / "weights").write_text("one")
    assert changed()
    (root / "b" / "sql" / "weights").write_text("two")
    assert changed()
    (root / "b" / "sql").rename(root / "b" / "renamed")
    assert changed()
    (root / "a" / "pirate" / "adapter_config.json").unlink()
    assert changed()
    _folders(tmp_path / "later", "x")
    assert changed()
    (root / "a" / "README").touch()
    assert not changed(), "files beside adapters do not count"


def test_every_folder_in_which_a_match_may_appear_is_watched(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "teams" / "a" / "adapters", "pirate")
    (tmp_path / "teams" / "b").mkdir()
    watched = load(_manifest("{from: [./teams/*/adapters/*, ./none/*]}")).inputs.folders_to_watch()
    here = {path.relative_to(tmp_path).as_posix() for path in watched}
    assert {".", "teams", "teams/a", "teams/b", "teams/a/adapters", "teams/a/adapters/pirate"} <= here


def test_the_name_of_a_folder_cannot_steer_a_terminal(load: Load, tmp_path: Path) -> None:
    _folders(tmp_path / "adapters", "red\x1b[31m", os.fsdecode(b"caf\xe9"))
    messages = [warning.message for warning in load(_manifest("{from: ./adapters/*}")).warnings]
    assert len(messages) == 2
    assert all(message.isprintable() for message in messages), messages
