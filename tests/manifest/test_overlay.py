"""Several files as one manifest: what merges, what replaces, and that every place stays in its own file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.advice import advise
from runner.manifest.formats import render_github, render_json, render_junit
from runner.manifest.load import Loaded, load_manifest, manifest_name
from runner.manifest.report import FileReport, render_diagnostics
from runner.manifest.sarif import render_sarif

BASE = """
name: base
memory: {limit: 75%, reserve: 2GiB}
servers:
  lm: {port: 8080, models: [chat, other]}
defaults: {generation: {temperature: 0.5, top_p: 0.9}}
models:
  chat:
    source: ./chat
    aliases: [one, two]
    adapters: {pirate: ./pirate, sql: {source: ./sql, scale: 10}}
    generation: {stop: [a, b], max_tokens: 10}
  other: {source: ./other}
"""


class Files:
    """Files in folders of their own, loaded together."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: list[Path] = []

    def add(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        self.paths.append(path)
        return path

    def load(self, *overlays: str, base: str = BASE, env: Mapping[str, str] | None = None) -> Loaded:
        self.paths = []
        self.add("base.yaml", base)
        for number, text in enumerate(overlays):
            self.add(f"over/{number}.yaml", text)
        return load_manifest(self.paths, env or {})

    def wrong(self, *overlays: str, **more: Any) -> list[Diagnostic]:
        with pytest.raises(ManifestError) as caught:
            self.load(*overlays, **more)
        return caught.value.diagnostics


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_mappings_merge_by_key_and_everything_else_is_replaced(files: Files) -> None:
    loaded = files.load(
        """
        name: prod
        memory: {limit: 8GiB}
        servers:
          lm: {models: [chat]}
          lan: {port: 8081}
        models:
          chat:
            aliases: [three]
            generation: {stop: x, temperature: 1}
        """,
        "models: {chat: {source: ./better}}\n",
    )
    manifest = loaded.manifest
    assert manifest.name == "prod"
    assert manifest.memory is not None
    assert (manifest.memory.limit.size if manifest.memory.limit else 0, manifest.memory.reserve.size) == (2**33, 2**31)
    assert {n: (s.port, s.models) for n, s in manifest.servers.items()} == {
        "lm": (8080, ["chat"]),
        "lan": (8081, None),
    }
    chat = manifest.models["chat"]
    assert (chat.source, chat.aliases, list(chat.adapters)) == ("./better", ["three"], ["pirate", "sql"])
    assert chat.generation is not None
    assert (chat.generation.stop, chat.generation.max_tokens, chat.generation.temperature) == (["x"], 10, 1)
    assert list(manifest.models) == ["chat", "other"]
    assert advise(loaded) == []


def test_one_file_alone_is_what_it_was(files: Files) -> None:
    assert files.load().manifest == load_manifest(files.paths[0], {}).manifest


def test_reset_takes_away_and_override_replaces_a_mapping(files: Files) -> None:
    manifest = files.load(
        """
        memory: !reset
        models:
          other: !reset null
          chat:
            aliases: !reset []
            adapters: !override {new: ./new}
            generation: {stop: !reset , max_tokens: !override 5}
        servers: {lm: {models: !override [chat]}}
        """
    ).manifest
    assert manifest.memory is None
    assert list(manifest.models) == ["chat"]
    chat = manifest.models["chat"]
    assert (chat.aliases, list(chat.adapters)) == ([], ["new"])
    assert chat.generation is not None
    assert (chat.generation.stop, chat.generation.max_tokens) == (None, 5)


@pytest.mark.parametrize(
    ("overlay", "path", "hint"),
    [
        ("memroy: !reset\n", "memroy", 'did you mean "memory"?'),
        ("models: {chat: {kv_cache: !reset }}\n", "models.chat.kv_cache", "remove it"),
        ("models: {new: {source: ./n, aliases: !reset }}\n", "models.new.aliases", "remove it"),
        ("models: {chat: !override {source: ./n, aliases: !reset }}\n", "models.chat.aliases", "remove it"),
    ],
)
def test_a_reset_of_what_is_not_there_is_an_error(overlay: str, path: str, hint: str, files: Files) -> None:
    (found,) = files.wrong(overlay)
    assert (found.code, found.path, found.hint, found.line) == ("E114", path, hint, 1)


@pytest.mark.parametrize("tag", ["!Reset", "!merge", "!!reset"])
def test_other_tags_mean_nothing(tag: str, files: Files) -> None:
    assert [d.code for d in files.wrong(f"memory: {tag} {{}}\n")] == ["E110"]


def test_a_key_without_a_value_changes_nothing_and_says_so(files: Files) -> None:
    loaded = files.load("memory:\nmodels:\n  chat:\n    # aliases: [x]\n    generation: ~\n    kv_cache:\n")
    assert loaded.manifest == load_manifest(files.paths[0], {}).manifest
    found = advise(loaded)
    assert [(d.code, d.severity, d.line, d.path) for d in found] == [
        ("W101", "warning", 1, "memory"),
        ("W101", "warning", 5, "models.chat.generation"),
    ]
    assert found[0].file == str(files.paths[1])
    assert found[0].hint == "write memory: !reset to take it away"


def test_short_and_long_forms_of_an_adapter_merge(files: Files) -> None:
    adapters = files.load("models: {chat: {adapters: {pirate: {scale: 3}, sql: ../sql2}}}\n")
    entries = adapters.manifest.models["chat"].adapters
    assert (entries["pirate"].source, entries["pirate"].scale) == ("./pirate", 3)
    assert (entries["sql"].source, entries["sql"].scale) == ("../sql2", 10)
    path = ("models", "chat", "adapters")
    assert adapters.folder((*path, "pirate", "source")) == files.root
    assert adapters.folder((*path, "sql", "source")) == files.root / "over"


def test_relative_paths_start_in_the_folder_of_their_own_file(files: Files) -> None:
    (files.root / "over").mkdir()
    (files.root / "over" / "key").write_text("from-over")
    (files.root / "key").write_text("from-base")
    auth = 'auth: {api_keys: ["${file:key}"]}'
    loaded = files.load(
        f"servers: {{b: {{port: 8082, {auth}}}}}\nmodels: {{other: {{source: ./o}}}}\n",
        base=BASE.replace("lm: {port: 8080,", f"lm: {{port: 8080, {auth},"),
    )
    keys = {
        name: (server.auth.api_keys or [])[0].get_secret_value()
        for name, server in loaded.manifest.servers.items()
        if server.auth
    }
    assert keys == {"lm": "from-base", "b": "from-over"}
    assert loaded.folder(("models", "chat", "source")) == files.root
    assert loaded.folder(("models", "other", "source")) == files.root / "over"
    assert set(loaded.files) == {*files.paths, files.root / "key", files.root / "over" / "key"}


def test_what_is_replaced_need_not_be_filled_in_nor_right(files: Files) -> None:
    base = BASE.replace("port: 8080", 'port: "${NOT_SET}"').replace("limit: 75%", "limit: lots")
    loaded = files.load("servers: {lm: {port: 8081}}\nmemory: {limit: 1GiB}\n", base=base)
    assert loaded.manifest.servers["lm"].port == 8081


def test_a_variable_is_filled_in_where_it_wins(files: Files) -> None:
    loaded = files.load('name: "${NAME}"\nservers: {lm: {port: "${PORT}"}}\n', env={"NAME": "prod", "PORT": "9000"})
    assert (loaded.manifest.name, loaded.manifest.servers["lm"].port) == ("prod", 9000)


def test_every_mistake_is_told_in_the_file_it_comes_from(files: Files) -> None:
    found = files.wrong(
        "servers:\n  lm: {port: 80800}\nmodels: {chat: {default_adapter: nope}}\n",
        "models:\n  chat:\n    sorce: ./x\n  other: {aliases: [one]}\n",
        base=BASE.replace("limit: 75%", "limit: lots"),
    )
    told = [(Path(d.file).name, d.line, d.path, d.code) for d in found]
    assert told == [
        ("base.yaml", 3, "memory.limit", "E208"),
        ("0.yaml", 2, "servers.lm.port", "E204"),
        ("1.yaml", 3, "models.chat.sorce", "E201"),
    ]
    assert all(d.excerpt in Path(d.file).read_text() for d in found)


def test_syntax_errors_of_all_files_are_told_at_once(files: Files) -> None:
    found = files.wrong("servers: [\n", "a: 1\na: 2\n", base="name: x: y\n")
    assert [(Path(d.file).name, d.code) for d in found] == [
        ("base.yaml", "E105"),
        ("0.yaml", "E105"),
        ("1.yaml", "E109"),
    ]


def test_every_form_names_the_file_of_the_overlay(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.root)
    Path("base.yaml").write_text(BASE)
    Path("prod.yaml").write_text("models:\n  chat: {sorce: ./x}\n")
    with pytest.raises(ManifestError) as caught:
        load_manifest([Path("base.yaml"), Path("prod.yaml")], {})
    report = FileReport("base.yaml", tuple(caught.value.diagnostics), ("prod.yaml",))
    assert render_diagnostics(report.diagnostics).startswith('prod.yaml:2:10: models.chat.sorce: unknown key "sorce"')
    (file,) = json.loads(render_json([report]))["files"]
    assert (file["file"], file["overlays"], file["ok"]) == ("base.yaml", ["prod.yaml"], False)
    assert file["diagnostics"][0]["file"] == "prod.yaml"
    assert render_github([report]).startswith("::error file=prod.yaml,line=2,col=10,title=E201::")
    (result,) = json.loads(render_sarif([report]))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "prod.yaml"
    suite = ET.fromstring(render_junit([report]))[0]
    assert suite.get("name") == "base.yaml + prod.yaml"
    assert "prod.yaml:2:10" in (suite[0][0].text or "")


def test_anchors_and_merge_keys_stay_in_their_file(files: Files) -> None:
    overlay = "x-calm: &calm {temperature: 0}\nmodels: {chat: {generation: {<<: *calm, seed: 7}}}\n"
    generation = files.load(overlay).manifest.models["chat"].generation
    assert generation is not None
    assert (generation.temperature, generation.seed, generation.max_tokens) == (0, 7, 10)
    assert files.wrong("models: {chat: {generation: *calm}}\n", base="x-calm: &calm {}\n" + BASE)[0].code == "E107"


@pytest.mark.parametrize(("overlay", "code"), [("- a\n", "E203"), ("text\n", "E203"), ("# nothing\n", "E104")])
def test_an_overlay_that_is_no_mapping(overlay: str, code: str, files: Files) -> None:
    (found,) = files.wrong(overlay)
    assert (found.code, found.file) == (code, str(files.paths[1]))


def test_a_mapping_in_place_of_a_scalar_and_the_other_way_round(files: Files) -> None:
    found = files.wrong("models: {chat: ./chat}\nname: {x: 1}\n")
    assert [(d.path, d.code, Path(d.file).name) for d in found] == [
        ("models.chat", "E203", "0.yaml"),
        ("name", "E203", "0.yaml"),
    ]


def test_secrets_of_every_file_stay_hidden(files: Files) -> None:
    base = BASE.replace("lm: {port: 8080,", "lm: {port: 8080, auth: {api_keys: [sk-one]},")
    found = files.wrong("servers: {lm: {port: x, auth: {api_keys: [sk-two, 'a b']}}}\n", base=base)
    assert found
    assert "sk-" not in render_diagnostics(found)


def test_the_digest_is_of_all_files(files: Files) -> None:
    digests = {files.load(*overlays).digest for overlays in ([], ["x-a: 1\n"], ["x-a: 2\n"], ["x-a: 1\n", "x-b: 1\n"])}
    assert len(digests) == 4


def test_the_name_is_known_whatever_else_is_wrong(files: Files) -> None:
    base = files.add("base.yaml", "name: base\nservers: {lm: {prot: 1}}\n")
    over = files.add("over.yaml", 'name: "${WHO}"\n')
    assert manifest_name(base, {}) == "base"
    assert manifest_name([base, over], {"WHO": "prod"}) == "prod"
    with pytest.raises(ManifestError):
        manifest_name([base, over], {})
    with pytest.raises(ManifestError) as caught:
        manifest_name(files.add("none.yaml", "servers: {}\n"), {})
    assert caught.value.diagnostics[0].code == "E202"


@pytest.mark.parametrize(
    ("overlay", "told"),
    [
        ("models: {chat: {source: org/other}}", True),
        (f"models: {{chat: {{source: org/other, revision: {'b' * 40}}}}}", False),
        ("models: {chat: {source: ./chat, revision: !reset }}", False),
        (f"models: {{chat: {{revision: {'b' * 40}}}}}", False),
        ("models: {chat: {aliases: [x]}}", False),
    ],
)
def test_a_revision_that_an_overlay_leaves_behind_is_a_warning(overlay: str, told: bool, files: Files) -> None:
    base = f"name: dev\nservers: {{lm: {{port: 1}}}}\nmodels: {{chat: {{source: org/chat, revision: {'a' * 40}}}}}\n"
    found = [d for d in advise(files.load(overlay + "\n", base=base)) if d.code == "W602"]
    assert [(Path(d.file).name, d.line, d.path) for d in found] == ([("base.yaml", 3, "models.chat.revision")] * told)
