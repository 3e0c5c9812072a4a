"""From a manifest and folders to the desired state, or to what is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.manifest.load import load_manifest
from runner.plan.digests import DigestCache
from runner.plan.resolve import PREFIX_CACHE_BYTES, NotDownloaded, resolve
from runner.plan.spec import AdapterSpec, DraftSpec, EngineLimits, ListenerSpec

from .conftest import Place
from .folders import GIB, adapter, hub_snapshot, later, model, safetensors, write


def test_a_full_manifest(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "models" / "chat", weights=5000)
    adapter(tmp_path / "models" / "pirate")
    adapter(tmp_path / "models" / "shout", fill=b"\2")
    desired = place.resolve(
        """
        name: dev
        memory: {limit: 75%, reserve: 2GiB}
        defaults: {generation: {temperature: 0.5, top_p: 0.9}, batching: {max_rows: 8}, kv_cache: {max_context: 99}}
        servers:
          lm: {port: 8080, models: [chat]}
          lan:
            {port: 8081, host: 0.0.0.0, auth: {api_keys: ["${KEY}"]}, cors: {allow_origins: ["http://a.b"]}}
          local: {port: 8082, host: localhost}
        models:
          chat:
            source: ../models/chat
            aliases: [gpt-4o]
            memory_limit: 4GiB
            adapters:
              pirate: ../models/pirate
              shout: {source: ../models/shout, scale: 2.5}
            default_adapter: pirate
            generation: {temperature: 1, stop: x}
            batching: {max_queue: 3}
            kv_cache: {prefix_cache: 1MiB}
          plain: {source: ../models/chat}
        """
    )
    assert (desired.name, desired.memory_limit_bytes) == ("dev", 10 * GIB)
    chat, plain = desired.models
    assert (chat.name, chat.source, chat.path) == ("chat", "../models/chat", tmp_path / "models" / "chat")
    assert (chat.weights_bytes, chat.memory_limit_bytes) == (5000, 4 * GIB)
    assert (chat.aliases, chat.default_adapter) == (("gpt-4o",), "pirate")
    assert chat.generation == {"temperature": 1.0, "top_p": 0.9, "stop": ["x"]}
    assert chat.limits == EngineLimits(max_rows=8, max_queue=3, max_context=99, prefix_cache_bytes=2**20)
    pirate, shout = chat.adapters
    assert pirate == AdapterSpec("pirate", tmp_path / "models" / "pirate", pirate.digest)
    assert (shout.scale, shout.key) == (2.5, f"{shout.digest}@2.5")
    assert pirate.digest != shout.digest
    assert plain.limits.prefix_cache_bytes == PREFIX_CACHE_BYTES
    assert plain.generation == {"temperature": 0.5, "top_p": 0.9}
    assert plain.weights_digest == chat.weights_digest
    assert desired.listeners == (
        ListenerSpec("lm", "127.0.0.1", 8080, ("chat",)),
        ListenerSpec("lan", "0.0.0.0", 8081, ("chat", "plain"), ("openai",), ("sk-secret",), ("http://a.b",)),
        ListenerSpec("local", "127.0.0.1", 8082, ("chat", "plain")),
    )
    assert "sk-secret" not in repr(desired)


def test_a_draft_counts_and_makes_another_process(place: Place) -> None:
    model(place.folder / "chat", weights=5000)
    model(place.folder / "small", weights=700)
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat%s}}\n"
    plain = place.resolve(text % "").models[0]
    chat = place.resolve(text % ", draft: {source: ./small, num_draft_tokens: 6}").models[0]
    assert chat.draft == DraftSpec("./small", place.folder / "small", chat.draft.digest if chat.draft else "")
    assert (chat.weights_bytes, chat.limits.num_draft_tokens) == (5700, 6)
    assert (plain.weights_bytes, plain.limits.num_draft_tokens) == (5000, 0)
    assert chat.process_digest not in (plain.process_digest, chat.weights_digest)
    fewer = place.resolve(text % ", draft: {source: ./small, num_draft_tokens: 2}").models[0]
    assert fewer.process_digest == chat.process_digest


def test_a_consent_to_code_and_every_change_of_it_make_another_process(place: Place) -> None:
    chat, small = model(place.folder / "chat"), model(place.folder / "small")
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat%s, draft: {source: ./small%s}}}\n"
    yes = ", trust_remote_code: true"
    specs = [place.resolve(text % given).models[0] for given in (("", ""), (yes, ""), ("", yes), (yes, yes))]
    assert [(s.trust_remote_code, s.draft and s.draft.trust_remote_code) for s in specs] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    for folder in (chat, small):
        write(folder / "own.py", "one = 1")
        specs.append(place.resolve(text % (yes, yes)).models[0])
        write(folder / "own.py", "one = 2")
        specs.append(place.resolve(text % (yes, yes)).models[0])
    assert len({spec.process_digest for spec in specs}) == len(specs)


def test_a_draft_that_is_not_there_is_told_at_its_place(place: Place) -> None:
    model(place.folder / "chat")
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat, draft: {source: %s}}}\n"
    (found,) = place.wrong(text % "./none")
    assert (found.path, found.code) == ("models.chat.draft.source", "E601")
    with pytest.raises(NotDownloaded) as caught:
        place.resolve(text % "org/small")
    assert (caught.value.repo, caught.value.revision) == ("org/small", "main")


def test_a_revision_of_a_local_draft_is_refused(place: Place) -> None:
    model(place.folder / "chat")
    (found,) = place.wrong(
        "name: dev\nservers: {lm: {port: 8080}}\n"
        "models: {chat: {source: ./chat, draft: {source: ./small, revision: main}}}\n"
    )
    assert (found.path, found.code) == ("models.chat.draft.revision", "E307")


SIMPLE = """
    name: dev
    servers: {lm: {port: 8080}}
    models:
      chat:
        source: ./chat
        adapters: {pirate: ./pirate}
"""


def test_the_same_files_give_the_same_state(place: Place) -> None:
    model(place.folder / "chat")
    adapter(place.folder / "pirate")
    before = place.resolve(SIMPLE)
    assert place.resolve(SIMPLE + "    # a comment\n") == before
    place.cache = DigestCache(now=later)
    assert place.resolve(SIMPLE) == before


def test_an_adapter_with_new_weights_has_a_new_key_and_the_model_stays(place: Place) -> None:
    model(place.folder / "chat")
    adapter(place.folder / "pirate")
    before = place.resolve(SIMPLE).models[0]
    adapter(place.folder / "pirate", fill=b"\7")
    after = place.resolve(SIMPLE).models[0]
    assert after.adapters[0].key != before.adapters[0].key
    assert after.process_digest == before.process_digest


def test_everything_wrong_is_told_at_its_place(place: Place) -> None:
    model(place.folder / "good")
    adapter(place.folder / "pirate")
    write(place.folder / "half" / "adapter_config.json", "{}")
    write(place.folder / "cut" / "adapter_config.json", "{}")
    write(place.folder / "cut" / "adapters.safetensors", safetensors({"a": 50})[:-10])
    write(place.folder / "file", "")
    found = place.wrong(
        """\
        name: dev
        servers: {lm: {port: 8080}}
        models:
          a: {source: ./none}
          b: {source: nothing}
          c: {source: ./file}
          d: {source: ./pirate}
          e:
            source: ./good
            adapters:
              half: ./half
              cut:
                source: ./cut
              good: ./pirate
        """
    )
    assert [(d.path, d.line, d.column) for d in found] == [
        ("models.a.source", 4, 15),
        ("models.b.source", 5, 15),
        ("models.c.source", 6, 15),
        ("models.d.source", 7, 15),
        ("models.e.adapters.half", 11, 13),
        ("models.e.adapters.cut.source", 13, 17),
    ]
    folder = place.folder
    assert [d.message for d in found] == [
        f"there is no folder {folder}/none",
        'there is no folder "nothing" beside the manifest',
        f"{folder}/file is a file, not a folder",
        f"{folder}/pirate holds no config.json",
        f"{folder}/half holds no adapters.safetensors",
        f"{folder}/cut/adapters.safetensors has 145 bytes where its header says 155",
    ]
    assert all(d.hint and d.excerpt for d in found)


def test_sources_are_paths_or_repositories(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors({"w": 9})}
    held = hub_snapshot(tmp_path / "hub", "org/chat", files)
    other = hub_snapshot(tmp_path / "hub", "org/chat", files, commit="d" * 40, ref="v2")
    folders = {
        "./chat": model(place.folder / "chat"),
        "chat": place.folder / "chat",
        "near/chat": model(place.folder / "near" / "chat"),
        "~/chat": model(tmp_path / "home" / "chat"),
        str(tmp_path / "abs"): model(tmp_path / "abs"),
        "org/chat": held,
    }
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels:\n"
    for index, source in enumerate(folders):
        text += f"  m{index}: {{source: '{source}'}}\n"
    text += f"  v2: {{source: org/chat, revision: v2}}\n  commit: {{source: org/chat, revision: {'c' * 40}}}\n"
    paths = [m.path for m in place.resolve(text).models]
    assert paths == [*folders.values(), other, held]


def test_a_repository_that_is_not_in_the_cache(place: Place, tmp_path: Path) -> None:
    model(place.folder / "chat")
    with pytest.raises(NotDownloaded) as caught:
        place.resolve(
            """\
            name: dev
            servers: {lm: {port: 8080}}
            models:
              chat: {source: ./chat, adapters: {a: {source: org/a, revision: v2}, b: org/b}}
              other: {source: org/b}
            """
        )
    assert (caught.value.repo, caught.value.revision) == ("org/a", "v2")
    assert [(d.line, d.path) for d in caught.value.diagnostics] == [
        (4, "models.chat.adapters.a.source"),
        (4, "models.chat.adapters.b"),
    ]


def test_a_repository_of_which_only_a_part_is_in_the_cache(place: Place, tmp_path: Path) -> None:
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: org/chat}}\n"
    folder = hub_snapshot(tmp_path / "hub", "org/chat", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(NotDownloaded) as caught:
        place.resolve(text)
    assert "is not whole in the hub's cache" in str(caught.value)
    assert "holds no model*.safetensors" in str(caught.value)
    hub_snapshot(tmp_path / "hub", "org/chat", {"model.safetensors": safetensors({"w": 4})})
    assert place.resolve(text).models[0].path == folder
    names = ("config.json", "model.safetensors", "tokenizer.json", "README.md", "a.bin")
    listed = {"files": {name: {"size": 1} for name in names}}
    write(tmp_path / "hub" / "models--org--chat" / "trees" / f"{'c' * 40}.json", json.dumps(listed))
    with pytest.raises(NotDownloaded, match=r"in the hub's cache without tokenizer\.json"):
        place.resolve(text)
    hub_snapshot(tmp_path / "hub", "org/chat", {"tokenizer.json": b"{}"})
    assert place.resolve(text).downloads == ()


def test_what_is_wrong_comes_before_what_is_missing(place: Place) -> None:
    found = place.wrong("name: dev\nservers: {lm: {port: 8080}}\nmodels: {a: {source: org/a}, b: {source: ./none}}\n")
    assert [d.path for d in found] == ["models.b.source"]


def test_links_are_kept_as_they_are(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "store" / "v1")
    model(tmp_path / "store" / "v2", vocab_size=5)
    (tmp_path / "current").symlink_to(tmp_path / "store" / "v1")
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ../current}}\n"
    before = place.resolve(text).models[0]
    assert before.path == tmp_path / "current"
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "store" / "v2")
    after = place.resolve(text).models[0]
    assert after.path == before.path
    assert after.weights_digest != before.weights_digest


def test_dots_after_a_link_lead_where_the_file_system_says(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "far" / "chat")
    (tmp_path / "far" / "deep").mkdir()
    (place.folder / "link").symlink_to(tmp_path / "far" / "deep")
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./link/../chat}}\n"
    assert place.resolve(text).models[0].path.samefile(tmp_path / "far" / "chat")


FOUND = """
name: dev
servers: {lm: {port: 8080}}
models: {chat: {source: ../models/chat, adapters: {from: ../adapters/*}}}
"""


def test_found_adapters_are_resolved_like_listed_ones(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "models" / "chat")
    for number, name in enumerate(("pirate", "sql")):
        adapter(tmp_path / "adapters" / name, fill=bytes([number]))
    (chat,) = place.resolve(FOUND).models
    assert [(a.name, a.path) for a in chat.adapters] == [(n, tmp_path / "adapters" / n) for n in ("pirate", "sql")]


def test_a_found_adapter_that_is_not_whole_is_left_out_or_stays_what_it_was(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "models" / "chat")
    weights = adapter(tmp_path / "adapters" / "pirate") / "adapters.safetensors"
    (pirate,) = place.resolve(FOUND).models[0].adapters
    whole = weights.read_bytes()
    write(weights, whole[:-7])
    write(tmp_path / "adapters" / "new" / "adapter_config.json", '{"fine_tune_type": "lora"}')
    loaded = load_manifest(place.folder / "dev.yaml", {})
    (chat,) = resolve(loaded, machine_memory=GIB, cache=place.cache).models
    assert chat.adapters == (pirate,)
    assert [(d.code, d.severity, d.path.rpartition(".")[2]) for d in loaded.warnings] == [
        ("W612", "warning", "new"),
        ("W612", "warning", "pirate"),
    ]
    assert "holds no adapters.safetensors" in loaded.warnings[0].message
    # a runner that has not seen it whole cannot go on with it
    assert resolve(loaded, machine_memory=GIB, cache=DigestCache(now=later)).models[0].adapters == ()
    # whole again, in another version
    write(weights, whole[:-1] + b"\2")
    (again,) = place.resolve(FOUND).models[0].adapters
    assert (again.name, again.digest != pirate.digest) == ("pirate", True)
    # gone and half there again: what it was before does not count
    (tmp_path / "adapters" / "pirate").rename(tmp_path / "elsewhere")
    assert place.resolve(FOUND).models[0].adapters == ()
    (tmp_path / "elsewhere").rename(tmp_path / "adapters" / "pirate")
    write(weights, whole[:-7])
    assert place.resolve(FOUND).models[0].adapters == ()


def test_a_default_adapter_that_is_not_whole_is_an_error(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "models" / "chat")
    write(tmp_path / "adapters" / "new" / "adapter_config.json", '{"fine_tune_type": "lora"}')
    (found,) = place.wrong(FOUND.replace("adapters:", "default_adapter: new, adapters:"))
    assert (found.code, found.path) == ("E602", "models.chat.adapters.new")
