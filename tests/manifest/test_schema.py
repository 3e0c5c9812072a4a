"""The JSON schema: committed as generated, and of one mind with the models about the shape of a manifest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.schema import OVERLAY_FILE, SCHEMA_FILE, manifest_schema, overlay_schema, render_schema
from runner.manifest.source import Source
from runner.manifest.walk import read_tree

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "." not in path.stem)
OVERLAYS = sorted((ROOT / "configs").glob("*.*.yaml"))
VALIDATOR = jsonschema.Draft7Validator(manifest_schema())
OVERLAY_VALIDATOR = jsonschema.Draft7Validator(overlay_schema())


def _data(text: str) -> Any:
    """What an editor sees: `${…}` are texts as they stand."""
    return read_tree(Source("dev.yaml", Path("/nowhere/dev.yaml"), text)).data


def test_the_committed_schema_is_the_generated_one() -> None:
    for file, overlay in ((SCHEMA_FILE, False), (OVERLAY_FILE, True)):
        text = render_schema(overlay=overlay)
        assert file.read_text(encoding="utf-8") == text, "run python -m runner.manifest.schema --write"


def test_the_command_prints_it() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "runner.manifest.schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert done.stdout == render_schema()


def test_it_is_draft_07() -> None:
    _is_draft_07(manifest_schema())
    _is_draft_07(overlay_schema())


def _is_draft_07(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    assert not _keywords(schema) & {"$defs", "prefixItems", "dependentRequired", "unevaluatedProperties"}
    assert all(set(node) == {"$ref"} for node in _nodes(schema) if "$ref" in node), (
        "draft-07 ignores what is beside $ref"
    )


def _nodes(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, dict):
        return [schema] + [node for value in schema.values() for node in _nodes(value)]
    return [node for value in schema for node in _nodes(value)] if isinstance(schema, list) else []


def _keywords(schema: Any) -> set[str]:
    return {key for node in _nodes(schema) for key in node}


def test_every_key_has_a_description_and_an_example_that_is_valid() -> None:
    schema = manifest_schema()
    sections = [schema, *schema["definitions"].values()]
    fields = [(key, field) for section in sections for key, field in section.get("properties", {}).items()]
    assert len(fields) > 50
    for key, field in fields:
        assert field["description"], key
        assert field["examples"], key
        for example in field["examples"]:
            jsonschema.Draft7Validator({**field, "definitions": schema["definitions"]}).validate(example)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_takes_the_configs(path: Path) -> None:
    first, text = path.read_text(encoding="utf-8").split("\n", 1)
    assert first == "# yaml-language-server: $schema=../schemas/manifest.schema.json"
    VALIDATOR.validate(_data(text))
    load_manifest(path, {"LAN_KEY": "key"})


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_overlays_have_a_schema_of_their_own(path: Path) -> None:
    first, text = path.read_text(encoding="utf-8").split("\n", 1)
    assert first == "# yaml-language-server: $schema=../schemas/overlay.schema.json"
    OVERLAY_VALIDATOR.validate(_data(text))
    assert not VALIDATOR.is_valid(_data(text)), "alone it is no manifest"
    base = path.with_name(f"{path.name.partition('.')[0]}.yaml")
    load_manifest([base, path], {"LAN_KEY": "key"})


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("{}", True),
        ("servers: {lm: {host: 127.0.0.1}}", True),
        ("servers: {lm: !reset null}", True),
        ("models: {chat: {source: !reset , adapters: {a: {scale: 2}, b: !reset null}}}", True),
        ("servers: {lm: {port: 80800}}", False),
        ("sevrers: {}", False),
        ("models: {chat: {sorce: ./x}}", False),
        ("models: {Chat: {}}", False),
        ("models: {chat: {kv_cache: {max_contxt: 5}}}", False),
    ],
)
def test_an_overlay_may_leave_out_anything_and_no_more(text: str, valid: bool) -> None:
    assert OVERLAY_VALIDATOR.is_valid(_data(text)) is valid


def test_configs_are_what_they_are_said_to_be() -> None:
    assert {"dev.yaml", "minimal.yaml", "production.yaml"} <= {path.name for path in CONFIGS}
    assert {"production.cuda.yaml", "production.small.yaml"} <= {path.name for path in OVERLAYS}
    assert len((ROOT / "configs" / "minimal.yaml").read_text(encoding="utf-8").splitlines()) == 6
    dev = load_manifest(ROOT / "configs" / "dev.yaml", {})
    assert {name: server.port for name, server in dev.manifest.servers.items()} == {"main": 8080}
    assert list(dev.manifest.models["demo-chat"].adapters) == ["pirate", "shout"]
    lines = {dev.at(("models", "demo-chat", "adapters", name), "").line for name in ("pirate", "shout")}
    assert len(lines) == 2


def test_it_takes_all_that_the_loader_takes() -> None:
    text = """
name: dev
x-mine: {any: thing}
memory: {limit: "${LIMIT}", reserve: 1048576, x-mine: 1}
servers:
  lm: {port: "${PORT}", host: "${HOST}", models: , apis: ["${API}"], auth: {allow_unauthenticated: "${OPEN}"}}
defaults: {generation: {temperature: 0.7, stop: "x"}}
models:
  chat:
    source: ./chat
    aliases:
    adapters: {a: ./a, b: {source: ./b, scale: "${SCALE}"}}
    kv_cache: {prefix_cache: 0}
    generation: {stop: [a, b], chat_template_kwargs: {x-y: {z: [1]}}}
"""
    VALIDATOR.validate(_data(text))


HEAD = "name: dev\nservers: {lm: {port: 8080}}\n"
CHAT = "models: {chat: {source: ./chat}}\n"
DAMAGED = [
    "[]",
    "text",
    "{}",
    "name: dev\n" + CHAT,
    HEAD,
    "name:\nservers: {lm: {port: 8080}}\n" + CHAT,
    "name: 5\nservers: {lm: {port: 8080}}\n" + CHAT,
    "name: My Runner\nservers: {lm: {port: 8080}}\n" + CHAT,
    HEAD + CHAT + "sevrers: {}\n",
    HEAD + CHAT + "y-mine: 1\n",
    HEAD + CHAT + "memory: 4GiB\n",
    HEAD + CHAT + "memory: {limit: 4gb}\n",
    HEAD + CHAT + "memory: {limit: 101%}\n",
    HEAD + CHAT + "memory: {limit: -1}\n",
    HEAD + CHAT + "defaults: {source: ./x}\n",
    HEAD + CHAT + "defaults: {generation: {temperature: 3}}\n",
    "name: dev\nservers: {}\n" + CHAT,
    "name: dev\nservers: [{port: 8080}]\n" + CHAT,
    "name: dev\nservers: {LM: {port: 8080}}\n" + CHAT,
    "name: dev\nservers: {lm: {host: 127.0.0.1}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: '8080'}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 0}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 65536}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, host: example.com}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, models: chat}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, models: []}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, apis: [openapi]}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, auth: {api_keys: []}}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, auth: {api_keys: ['']}}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, auth: {allow_unauthenticated: on}}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, cors: {allow_origins: [localhost]}}}\n" + CHAT,
    "name: dev\nservers: {lm: {port: 8080, cors: {}}}\n" + CHAT,
    HEAD + "models: {}\n",
    HEAD + "models: {chat: }\n",
    HEAD + "models: {chat: ./chat}\n",
    HEAD + "models: {chat: {sorce: ./chat}}\n",
    HEAD + "models: {chat: {source: ''}}\n",
    HEAD + "models: {chat: {source: ./chat, aliases: ['a:b']}}\n",
    HEAD + "models: {chat: {source: ./chat, adapters: [./a]}}\n",
    HEAD + "models: {chat: {source: ./chat, adapters: {a: 5}}}\n",
    HEAD + "models: {chat: {source: ./chat, adapters: {a: }}}\n",
    HEAD + "models: {chat: {source: ./chat, adapters: {a: {scale: 1}}}}\n",
    HEAD + "models: {chat: {source: ./chat, batching: {max_rows: 0}}}\n",
    HEAD + "models: {chat: {source: ./chat, batching: {max_rows: 1.5}}}\n",
    HEAD + "models: {chat: {source: ./chat, generation: {stop: [5]}}}\n",
    HEAD + "models: {chat: {source: ./chat, generation: {top_p: 1.5}}}\n",
    HEAD + "models: {chat: {source: ./chat, quantization: {bits: 7}}}\n",
    HEAD + "models: {chat: {source: ./chat, load: lazy}}\n",
    HEAD + "models: {chat: {source: ./chat, idle_timeout: 30}}\n",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_it_refuses_what_the_models_refuse(text: str, tmp_path: Path) -> None:
    assert not VALIDATOR.is_valid(_data(text))
    path = tmp_path / "dev.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError):
        load_manifest(path, {})
