"""Whatever happens to a manifest's text, loading gives a manifest or ManifestError, and no key is passed over."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from runner.errors import ManifestError
from runner.manifest.load import Loaded, load_manifest
from runner.manifest.report import render_diagnostics
from runner.manifest.section import Section

SOUND = """\
name: dev
x-own: &own {max_rows: 4}
memory: {limit: 75%, reserve: 2GiB}
servers:
  lm: {port: 8080, models: [chat], cors: {allow_origins: ["http://localhost:3000"]}}
  lan:
    port: "${PORT:-8081}"
    host: 0.0.0.0
    auth: {api_keys: ["${KEY}", sk-literal]}
defaults:
  generation: {temperature: 0.7}
models:
  chat:
    source: org/chat
    revision: main
    aliases: [gpt-4o]
    memory_limit: 4GiB
    kv_cache: {max_context: 16384, prefix_cache: 1GiB}
    batching: {<<: *own, max_queue: 5}
    adapters:
      pirate: ../adapters/pirate
      sql: {source: org/sql, scale: 10}
    default_adapter: pirate
    generation: {stop: ["###"], top_k: 40}
"""
ENV = {"KEY": "sk-from-env", "PORT": "8082", "EMPTY": ""}
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

_WORDS = (
    "null ~ -1 true .nan x- source port models auth api_keys *own ${ $ ${KEY} ${NO} ${file:x} ' \" { } [ ] # | > % @"
)
SPLICES = st.one_of(
    st.sampled_from(_WORDS.split()),
    st.sampled_from(
        ["\n", "\r", "\t", " ", ":", ": ", "- ", "&a ", "!!int ", "<<: ", "x-a: ", "---\n", "...\n", "9" * 30]
    ),
    st.sampled_from(["\x00", "\x85", "\u2028", "\ufeff", "é", "模"]),
    st.text(max_size=8),
)


@st.composite
def _damaged(draw: st.DrawFn) -> str:
    """The sound manifest after one to four cuts, insertions, or moves of a line."""
    text = SOUND
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["cut", "insert", "replace", "move", "indent"]))
        length = draw(st.integers(1, 20))
        if kind == "cut":
            text = text[:at] + text[at + length :]
        elif kind == "insert":
            text = text[:at] + draw(SPLICES) + text[at:]
        elif kind == "replace":
            text = text[:at] + draw(SPLICES) + text[at + length :]
        else:
            lines = text.split("\n")
            line = lines.pop(draw(st.integers(0, len(lines) - 1)))
            line = " " * draw(st.integers(0, 3)) + (line if kind == "move" else line.strip())
            lines.insert(draw(st.integers(0, len(lines))), line)
            text = "\n".join(lines)
    return text


def _load(content: bytes) -> Loaded | ManifestError:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dev.yaml"
        path.write_bytes(content)
        try:
            found: Loaded | ManifestError = load_manifest(path, ENV)
        except ManifestError as error:
            found = error
    if isinstance(found, ManifestError):
        said = render_diagnostics(found.diagnostics)
        assert said
        assert "sk-from-env" not in said
    return found


def _assert_nothing_passed_over(section: BaseModel, written: Any) -> None:
    """Every key of the document is the user's own, has no value, or was set; read with PyYAML's own constructor."""
    if not isinstance(written, dict):
        return
    keys = {key for key, value in written.items() if not key.startswith("x-") and value not in ("", "~", "null")}
    merged = "<<" in keys
    assert keys - {"<<"} <= section.model_fields_set
    assert merged or section.model_fields_set <= written.keys()
    for key in section.model_fields_set & written.keys():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            _assert_nothing_passed_over(value, written[key])
        elif isinstance(value, dict) and all(isinstance(entry, BaseModel) for entry in value.values()):
            for name, entry in value.items():
                _assert_nothing_passed_over(entry, written[key][name])


@SETTINGS
@given(_damaged())
def test_damaged_text(text: str) -> None:
    found = _load(text.encode("utf-8", "surrogatepass"))
    if isinstance(found, Loaded):
        _assert_nothing_passed_over(found.manifest, yaml.load(text, yaml.CBaseLoader))


@SETTINGS
@given(st.binary(max_size=60), st.integers(0, len(SOUND)))
def test_damaged_bytes(noise: bytes, at: int) -> None:
    content = SOUND.encode()
    _load(content[:at] + noise + content[at:])


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def _mappings(data: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    if not isinstance(data, dict):
        return []
    return [(path, data)] + [found for key, value in data.items() for found in _mappings(value, (*path, key))]


def _has_fixed_keys(path: tuple[str, ...]) -> bool:
    own = path[:1] == ("x-own",)
    return not own and path[-1:] not in [("servers",), ("models",), ("adapters",)]


@SETTINGS
@given(st.data(), VALUES)
def test_a_value_of_any_kind_in_any_place(data: st.DataObject, value: Any) -> None:
    document = yaml.safe_load(SOUND)
    _, mapping = data.draw(st.sampled_from([m for m in _mappings(document) if m[1]]))
    mapping[data.draw(st.sampled_from(sorted(mapping)))] = value
    _load(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@SETTINGS
@given(st.data(), st.from_regex(r"[a-z_]{1,12}", fullmatch=True), VALUES)
def test_an_unknown_key_is_never_accepted(data: st.DataObject, key: str, value: Any) -> None:
    document = yaml.safe_load(SOUND)
    path, mapping = data.draw(st.sampled_from([m for m in _mappings(document) if _has_fixed_keys(m[0])]))
    if key in _all_fields():
        key += "_not"
    mapping[key] = value
    text = yaml.safe_dump(document, allow_unicode=True)
    found = _load(text.encode("utf-8", "surrogatepass"))
    assert isinstance(found, ManifestError)
    told = {d.path for d in found.diagnostics}
    above = {".".join(path), ""}
    assert f"{'.'.join(path)}.{key}".lstrip(".") in told or told & above, found.diagnostics


def _all_fields() -> set[str]:
    return {name for section in Section.__subclasses__() for name in section.model_fields}
