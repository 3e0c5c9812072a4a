"""`load_manifest`: a file in, a validated manifest or all diagnostics out."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import Diagnostic, ManifestError
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.report import render_diagnostics
from runner.manifest.values import MemoryAmount

from .conftest import Load, Refused

FULL = """
    name: full
    x-note: mine
    x-base: &base {source: ./base, batching: {max_rows: 4}}
    memory: {limit: 75%, reserve: 2GiB}
    servers:
      lm: {port: 8080, models: [chat], cors: {allow_origins: ["http://localhost:3000"]}}
      lan:
        port: "${PORT:-8081}"
        host: 0.0.0.0
        auth: {api_keys: ["${KEY}", literal-key]}
        x-why: for the phone
    defaults: {load: eager, generation: {temperature: 0.7}}
    models:
      chat:
        <<: *base
        source: mlx-community/Llama-3.2-1B-Instruct-4bit
        revision: 08231374eeacb049a0eade7922910865b8fce912
        aliases: [gpt-4o-mini, meta-llama/Llama-3.2-1B]
        memory_limit: 4GiB
        kv_cache: {max_context: 16384, prefix_cache: 1GiB}
        adapters:
          pirate: ../adapters/pirate
          sql: {source: org/sql-lora, revision: main, scale: 10}
        default_adapter: pirate
        generation: {temperature: 1, stop: "###", max_tokens: 100, chat_template_kwargs: {enable_thinking: false}}
      base: *base
"""


def test_everything_that_a_manifest_may_say(load: Load) -> None:
    manifest = load(FULL, {"KEY": "from-the-environment"}).manifest
    assert manifest.name == "full"
    assert manifest.memory is not None
    assert manifest.memory.limit == MemoryAmount(percent=75)
    assert manifest.memory.reserve == MemoryAmount(size=2 * 2**30)
    assert (manifest.servers["lm"].host, manifest.servers["lm"].apis) == ("127.0.0.1", ["openai"])
    assert manifest.servers["lan"].port == 8081
    auth = manifest.servers["lan"].auth
    assert auth is not None
    assert [k.get_secret_value() for k in auth.api_keys or []] == ["from-the-environment", "literal-key"]
    chat = manifest.models["chat"]
    assert chat.source == "mlx-community/Llama-3.2-1B-Instruct-4bit"
    assert chat.batching is not None
    assert chat.batching.max_rows == 4
    assert chat.adapters["pirate"].source == "../adapters/pirate"
    assert (chat.adapters["sql"].revision, chat.adapters["sql"].scale) == ("main", 10.0)
    assert chat.generation is not None
    assert chat.generation.stop == ["###"]
    assert chat.generation.chat_template_kwargs == {"enable_thinking": False}
    assert manifest.models["base"].source == "./base"


def test_a_loaded_manifest_is_frozen(load: Load) -> None:
    loaded = load(FULL, {"KEY": "k"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.digest = ""  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        loaded.manifest.name = "other"


def test_keys_without_a_value_are_as_if_not_there(load: Load) -> None:
    manifest = load(
        """
        name: dev
        memory:
        servers:
          lm:
            port: 8080
            auth:
            models:
            cors: ~
        defaults:
        models:
          chat:
            source: ./chat
            aliases:
            adapters:
              # pirate: ./pirate
            generation: {temperature: , max_tokens: 5}
        """
    ).manifest
    assert manifest.memory is None
    assert manifest.servers["lm"].models is None
    assert manifest.models["chat"].adapters == {}
    assert manifest.models["chat"].generation == type(manifest.models["chat"].generation)(max_tokens=5)


def test_a_key_without_a_value_must_be_known(refused: Refused) -> None:
    found = refused("name: dev\nservers: {lm: {port: 8080, hosts: }}\nmodels: {chat: {source: ./chat}}\n")
    assert [d.message for d in found] == ['unknown key "hosts"']


def test_own_keys_are_possible_wherever_keys_are_fixed_and_nowhere_else(load: Load, refused: Refused) -> None:
    manifest = load(
        """
        name: dev
        x-a: {any: [thing, "$5", {x: "${NOT_SET}"}]}
        memory: {x-b: 1}
        servers:
          lm: {port: 8080, x-c: 1, auth: {allow_unauthenticated: true, x-d: 1}, cors: {allow_origins: ["*"], x-e: 1}}
        defaults: {x-f: 1, generation: {x-g: 1}}
        models:
          x-chat:
            {source: ./chat, x-h: , kv_cache: {x-i: 1}, batching: {x-j: 1}, adapters: {x-a: {source: ./a, x-k: 1}}}
        """
    ).manifest
    assert list(manifest.models) == ["x-chat"]
    assert list(manifest.models["x-chat"].adapters) == ["x-a"]
    found = refused("name: dev\nservers: {x-lm: 5}\nmodels: {chat: {source: ./chat, adapters: {x-a: 5}}}\n")
    assert [d.path for d in found] == ["servers.x-lm", "models.chat.adapters.x-a"]


def test_variables_are_typed_by_where_they_stand(load: Load) -> None:
    env = {"N": "8081", "T": " 0.5 ", "YES": "true", "SIZE": "2GiB", "BYTES": "1048576", "API": "openai"}
    manifest = load(
        """
        name: "${N}"
        servers:
          lm: {port: "${N}", apis: ["${API}"], auth: {api_keys: ["${N}"]}}
          open: {port: 8082, auth: {allow_unauthenticated: "${YES}"}}
        models:
          chat:
            source: "./${N}"
            aliases: ["${N}"]
            memory_limit: ${SIZE}
            kv_cache: {prefix_cache: "${BYTES}", max_context: "${N}"}
            generation: {temperature: "${T}", top_p: 1, stop: "${N}"}
        """,
        env,
    ).manifest
    chat, lm = manifest.models["chat"], manifest.servers["lm"]
    assert (manifest.name, lm.port, lm.apis, chat.source, chat.aliases) == (
        "8081",
        8081,
        ["openai"],
        "./8081",
        ["8081"],
    )
    assert lm.auth is not None
    assert lm.auth.api_keys is not None
    assert lm.auth.api_keys[0].get_secret_value() == "8081"
    assert manifest.servers["open"].auth is not None
    assert manifest.servers["open"].auth.allow_unauthenticated is True
    assert chat.memory_limit == 2 * 2**30
    assert chat.kv_cache is not None
    assert (chat.kv_cache.prefix_cache, chat.kv_cache.max_context) == (2**20, 8081)
    assert chat.generation is not None
    assert (chat.generation.temperature, chat.generation.stop) == (0.5, ["8081"])


def test_text_in_quotes_is_no_number(refused: Refused) -> None:
    found = refused('name: dev\nservers: {lm: {port: "8080"}}\nmodels: {chat: {source: ./chat}}\n')
    assert [(d.path, d.hint) for d in found] == [("servers.lm.port", "remove the quotes: 8080")]


def test_a_variable_in_a_message_is_shown_by_its_name(refused: Refused) -> None:
    text = 'name: dev\nservers: {lm: {port: "${KEY}", host: "${KEY}"}}\nmodels: {chat: {source: ./chat}}\n'
    found = refused(text, {"KEY": "sk-mistaken"})
    assert "sk-mistaken" not in render_diagnostics(found)
    assert found[0].message == "should be a whole number, not the value of ${KEY}"


SECRETS = """
    name: dev
    servers:
      a: {port: 8080, auth: {api_keys: [sk-in-the-file, "${KEY}"]}}
      b: {port: 8081, auth: {api_keys: ["${file:keys/b}", "pre-${file:keys/b}"]}}
    models:
      chat: {source: ./chat}
"""


def _shown(loaded: Loaded) -> str:
    """Every text form in which a manifest might end up somewhere."""
    manifest = loaded.manifest
    forms = [repr(loaded), str(loaded), repr(manifest), str(manifest), f"{manifest.servers}"]
    forms += [manifest.model_dump_json(), str(manifest.model_dump()), str(manifest.model_dump(mode="json"))]
    forms += [repr(loaded.tree), repr(loaded.tree.sources), str(dataclasses.replace(loaded))]
    forms += [render_diagnostics([loaded.at(("servers", name, "auth"), "x") for name in ("a", "b")])]
    return "\n".join(forms)


def test_secrets_are_in_no_repr_and_no_dump(load: Load, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "b").write_text("sk-in-another-file\r\n")
    loaded = load(SECRETS, {"KEY": "sk-in-the-environment"})
    keys = {
        name: [key.get_secret_value() for key in (server.auth and server.auth.api_keys) or []]
        for name, server in loaded.manifest.servers.items()
    }
    assert keys == {
        "a": ["sk-in-the-file", "sk-in-the-environment"],
        "b": ["sk-in-another-file", "pre-sk-in-another-file"],
    }
    assert "sk-" not in _shown(loaded)
    assert loaded.files == (tmp_path / "dev.yaml", tmp_path / "keys" / "b")


def test_secrets_are_in_no_error(load: Load, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "b").write_text("sk with spaces")
    with pytest.raises(ManifestError) as caught:
        load(SECRETS.replace("port: 8080", "port: x"), {"KEY": "sk-ünprintable"})
    error = caught.value
    assert len(error.diagnostics) == 4
    everything = render_diagnostics(error.diagnostics) + str(error) + repr(error) + repr(error.diagnostics)
    assert "sk-" not in everything
    assert "sk with" not in everything
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_secret_file_that_holds_no_key(content: bytes, load: Load, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "b").write_bytes(content)
    paths = {d.path for d in refused(SECRETS, {"KEY": "k"})}
    assert "servers.b.auth.api_keys[0]" in paths


def test_a_secret_file_must_be_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    os.mkfifo(tmp_path / "keys" / "b")
    assert {d.message for d in refused(SECRETS, {"KEY": "k"})} == {
        'the secret file "keys/b" cannot be read: not a regular file'
    }


def test_the_digest_is_of_all_that_matters(load: Load, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "b").write_text("one")
    digests = [load(SECRETS, {"KEY": "k"}).digest, load(SECRETS, {"KEY": "k", "OTHER": "x"}).digest]
    assert digests[0] == digests[1]
    digests += [load(SECRETS, {"KEY": "l"}).digest, load(SECRETS + "    # more\n", {"KEY": "k"}).digest]
    (tmp_path / "keys" / "b").write_text("two")
    digests += [load(SECRETS, {"KEY": "k"}).digest]
    assert len(set(digests[1:])) == 4


def test_at_points_into_the_file(load: Load, tmp_path: Path) -> None:
    loaded = load("name: dev\nservers: {lm: {port: 8080}}\nmodels:\n  chat:\n    source: ./chat\n")
    place = loaded.at(("models", "chat", "source"), "does not exist", "make it")
    file = str(tmp_path / "dev.yaml")
    assert place == Diagnostic(file, 5, 13, "models.chat.source", "does not exist", "make it", "    source: ./chat")
    assert loaded.at(("models", "chat", "adapters", "x"), "").line == 5
    assert loaded.at(("models", "chat"), "", at_key=True).line == 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {"missing.yaml": "there is no such file", ".": "is a folder, not a manifest"}
    (tmp_path / "latin.yaml").write_bytes(b"name: dev\n# caf\xe9\n")
    cases["latin.yaml"] = "is not UTF-8 text"
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    cases["large.yaml"] = "is larger than 1024 KiB, which no manifest is"
    for name, message in cases.items():
        with pytest.raises(ManifestError) as caught:
            load_manifest(tmp_path / name, {})
        assert [d.message for d in caught.value.diagnostics] == [message]
        if name == "latin.yaml":
            assert (caught.value.diagnostics[0].line, caught.value.diagnostics[0].column) == (2, 6)


def test_utf8_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dev.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n")
    loaded = load_manifest(path, {})
    assert loaded.at(("name",), "").column == 7


def test_all_problems_are_told_at_once_in_the_order_of_the_file(refused: Refused) -> None:
    found = refused(
        """
        name: Dev
        servers:
          lm: {port: 8080, models: [nope]}
          lm2: {port: 8081, apis: [admin], cors: {allow_origins: ["*"]}}
        models:
          chat: {sorce: ./chat}
          embed: {source: ./e, default_adapter: x, generation: {temperature: "${NOT_SET}"}}
          voice: {source: ./v, default_adapter: x}
        """
    )
    assert [d.path for d in found] == [
        "name",
        "servers.lm.models[0]",
        "servers.lm2.apis[0]",
        "models.chat.sorce",
        "models.embed.generation.temperature",
        "models.voice.default_adapter",
    ]
    assert [d.line for d in found] == sorted(d.line for d in found)


def test_a_model_with_errors_still_counts_as_there(refused: Refused) -> None:
    found = refused("name: dev\nservers: {lm: {port: 8080, models: [chat]}}\nmodels: {chat: {source: 5}}\n")
    assert [d.path for d in found] == ["models.chat.source"]


def test_servers_on_one_port_with_addresses_that_do_not_overlap(load: Load) -> None:
    text = "name: dev\nservers:\n  a: {port: 8080, host: 127.0.0.1}\n  b: {port: 8080, host: 127.0.0.2}\n"
    text += "  c: {port: 8080, host: '::1'}\nmodels: {chat: {source: ./chat}}\n"
    assert list(load(text).manifest.servers) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "127.0.0.2"),
        ("::", "127.0.0.1"),
        ("::", "::1"),
        ("::1", "0:0:0:0:0:0:0:1"),
    ],
)
def test_servers_on_addresses_that_overlap(one: str, other: str, refused: Refused) -> None:
    for first, second in ((one, other), (other, one)):
        text = "name: dev\nservers:\n"
        for name, host in (("a", first), ("b", second)):
            text += f"  {name}: {{port: 8080, host: '{host}', auth: {{allow_unauthenticated: true}}}}\n"
        assert [d.path for d in refused(text + "models: {chat: {source: ./chat}}\n")] == ["servers.b.port"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_auth(host: str, load: Load) -> None:
    text = f"name: dev\nservers: {{lm: {{port: 8080, host: '{host}'}}}}\nmodels: {{chat: {{source: ./chat}}}}\n"
    assert load(text).manifest.servers["lm"].auth is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "fe80::1", "::ffff:127.0.0.1", "128.0.0.1"])
def test_other_hosts_need_auth(host: str, refused: Refused) -> None:
    text = f"name: dev\nservers: {{lm: {{port: 8080, host: '{host}'}}}}\nmodels: {{chat: {{source: ./chat}}}}\n"
    (found,) = refused(text)
    assert found.path == "servers.lm.host"
    assert "api_keys" in found.hint
    assert "allow_unauthenticated: true" in found.hint


def test_diagnostics_can_be_sent_to_another_process(refused: Refused) -> None:
    found = refused("name: Dev\n")
    assert pickle.loads(pickle.dumps(found)) == found


LIGHT = """
import sys
import runner.manifest.report
assert not {"pydantic", "yaml"} & sys.modules.keys(), "printing diagnostics needs neither"
import runner.manifest.load
heavy = {"pydantic_settings", "huggingface_hub", "rich", "jsonschema", "difflib", "runner.manifest.words"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_what_loading_does_not_import() -> None:
    """What the import of this room costs is part of the time to the first answer."""
    command = [sys.executable, "-c", LIGHT]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system has no such names")
def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "dev.yaml").write_text("name: dev")
    with pytest.raises(ManifestError, match="has a path that is not UTF-8 text"):
        load_manifest(folder / "dev.yaml", {})
