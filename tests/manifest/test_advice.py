"""Warnings: what a sound manifest may want to hear, and what it is spared."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.manifest.advice import advise

from .conftest import Load

COMMIT = "08231374eeacb049a0eade7922910865b8fce912"


def _models(entry: str) -> str:
    return f"name: dev\nservers: {{main: {{port: 8080}}}}\nmodels: {{chat: {entry}}}\n"


@pytest.mark.parametrize(
    ("entry", "paths"),
    [
        ("{source: org/chat}", ["models.chat.source"]),
        ("{source: org/chat, revision: v2}", ["models.chat.revision"]),
        (f"{{source: org/chat, revision: {COMMIT}}}", []),
        (f"{{source: org/chat, revision: {COMMIT[:12]}}}", ["models.chat.revision"]),
        ("{source: ./chat}", []),
        ("{source: near/chat}", []),
        ("{source: near/chat, revision: main}", ["models.chat.revision"]),
        ("{source: ./chat, adapters: {a: org/a}}", ["models.chat.adapters.a.source"]),
        ("{source: ./chat, adapters: {a: {source: org/a, revision: v1}}}", ["models.chat.adapters.a.revision"]),
    ],
)
def test_hub_sources_without_a_commit(entry: str, paths: list[str], load: Load, tmp_path: Path) -> None:
    (tmp_path / "near" / "chat").mkdir(parents=True)
    found = advise(load(_models(entry)))
    assert [d.path for d in found] == paths
    assert all((d.code, d.severity) == ("W601", "warning") and d.line == 3 and d.hint for d in found)


@pytest.mark.parametrize(
    ("server", "count"),
    [
        ("host: 0.0.0.0, auth: {allow_unauthenticated: true}", 1),
        ('host: "::", auth: {allow_unauthenticated: true}', 1),
        ("host: 127.0.0.1, auth: {allow_unauthenticated: true}", 0),
        ("host: 0.0.0.0, auth: {api_keys: [key-1]}", 0),
    ],
)
def test_servers_that_are_open_to_everybody(server: str, count: int, load: Load) -> None:
    found = advise(load(f"name: dev\nservers: {{main: {{port: 8080, {server}}}}}\nmodels: {{chat: {{source: ./c}}}}\n"))
    assert [d.code for d in found] == ["W501"] * count
    assert all(d.path == "servers.main.auth.allow_unauthenticated" and d.line == 2 for d in found)


def test_in_the_order_of_the_file(load: Load) -> None:
    text = (
        "name: dev\nmodels: {a: {source: org/a}, b: {source: org/b}}\n"
        "servers: {main: {port: 8080, host: 0.0.0.0, auth: {allow_unauthenticated: true}}}\n"
    )
    assert [d.code for d in advise(load(text))] == ["W601", "W601", "W501"]
