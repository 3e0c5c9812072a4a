"""Files as they really arrive, damaged by editors, tools and people; `real_life.golden` has what is said of each.

After a change of words, write it anew and read the difference:

    UPDATE_GOLDEN=1 pytest tests/manifest/test_real_life.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import ManifestError
from runner.manifest.load import load_manifest
from runner.manifest.report import render_diagnostics

GOLDEN = Path(__file__).with_name("real_life.golden")

SOUND = """\
name: dev
servers:
  main:
    port: 8080
models:
  chat:
    source: ./chat
    aliases:
      - demo
    generation: {temperature: 0.7, stop: ["###"]}
"""
COMPOSE = """\
services:
  web:
    image: nginx
    ports: ["8080:80"]
volumes: {}
"""
KUBERNETES = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: chat}
spec: {replicas: 1}
"""
CONFLICT = """\
servers:
  main:
<<<<<<< HEAD
    port: 8080
=======
    port: 8081
>>>>>>> feature
"""


def _replaced(old: str, new: str) -> bytes:
    assert old in SOUND
    return SOUND.replace(old, new).encode()


def _with_mistake(transform: Callable[[str], bytes]) -> bytes:
    """Damage that is none by itself: the mistake has to be told at the right place."""
    return transform(SOUND.replace("temperature", "temprature"))


CASES: dict[str, bytes] = {
    "tabs to indent": _replaced("  main:\n    port", "\tmain:\n\t\tport"),
    "a tab after the spaces": _replaced("    port", "  \tport"),
    "Windows line breaks, and a mistake": _with_mistake(lambda text: text.replace("\n", "\r\n").encode()),
    "old Mac line breaks, and a mistake": _with_mistake(lambda text: text.replace("\n", "\r").encode()),
    "mixed line breaks, and a mistake": _with_mistake(lambda text: text.replace("\n", "\r\n", 3).encode()),
    "a byte order mark, and a mistake in the first line": ("\ufeff" + SOUND.replace("name:", "nmae:", 1)).encode(),
    "UTF-16 as Windows' editors write it": SOUND.encode("utf-16"),
    "UTF-16 without a mark": SOUND.encode("utf-16-le"),
    "Latin-1": SOUND.replace("demo", "gr\xf6\xdfe").encode("latin-1"),
    "a null byte at the end, after a crash": SOUND.encode() + b"\0\0\0\0",
    "cut off in the middle of a line": SOUND.encode()[: SOUND.index("temperature: ") + 8],
    "cut off after a key": SOUND.encode()[: SOUND.index(" ./chat")],
    "an empty file": b"",
    "nothing but comments": b"# nothing\n# yet\n",
    "marks of a merge conflict": _replaced("servers:\n  main:\n    port: 8080\n", CONFLICT),
    "a diff pasted": SOUND.replace("\n  ", "\n+  ").encode(),
    "smart quotes": _replaced("./chat", "“./chat”").replace(b"8080", "“8080”".encode()),
    "a dash that a word processor made": _replaced("      - demo", "      – demo"),
    "a wide colon": _replaced("port: 8080", "port：8080"),
    "a zero-width space in a key": _replaced("port:", "po\u200brt:"),
    "no-break spaces to indent": _replaced("    port", "\u00a0\u00a0\u00a0\u00a0port"),
    "a no-break space after a colon": _replaced("port: 8080", "port:\u00a08080"),
    "a Windows path in double quotes": _replaced("./chat", '"C:\\models\\chat"'),
    "Jinja left in place of a value": _replaced("./chat", "{{ model_path }}"),
    "Jinja statements": _replaced("models:", "{% for m in models %}\nmodels:"),
    "Helm statements": _replaced("    port", "    {{- if .Values.port }}\n    port"),
    "JSON with a comment": b'{\n  // mine\n  "name": "dev",\n  "servers": {"main": {"port": 8080}}\n}\n',
    "JSON without its first line": b'  "name": "dev",\n  "servers": {"main": {"port": 8080}}\n}\n',
    "a Python dict": b"{'name': 'dev', 'memory': None, 'servers': {'main': {'port': 8080, 'cors': False}}}\n",
    "two documents": (SOUND + "---\n" + SOUND).encode(),
    "a fence of Markdown around it": ("```yaml\n" + SOUND + "```\n").encode(),
    "the page instead of the file": b"<!DOCTYPE html>\n<html><head><title>dev.yaml</title></head>\n",
    "a .env file": b"PORT=8080\nMODEL=./chat\n",
    "a TOML file": b"[servers.main]\nport = 8080\n",
    "a compose file": COMPOSE.encode(),
    "a Kubernetes object": KUBERNETES.encode(),
    "a binary": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(range(128, 160)),
    "no space after a colon": _replaced("port: 8080", "port:8080"),
    "one space too few": _replaced("    aliases:", "   aliases:"),
    "one space too many": _replaced("    source:", "     source:"),
    "a quote that is not closed": _replaced("./chat", '"./chat'),
    "a % at the beginning": _replaced("name: dev", "name: %dev"),
    "a list where names belong": _replaced("  chat:\n    source", "  - chat:\n    source"),
    "a version as the first line": ("version: 3\n" + SOUND).encode(),
}


def _golden() -> dict[str, str]:
    parts = re.split(r"^=== (.*)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[0::2], parts[1::2], strict=True))


def _said(content: bytes, folder: Path) -> str:
    (folder / "dev.yaml").write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        load_manifest(Path("dev.yaml"), {})
    assert all(found.code for found in caught.value.diagnostics)
    return render_diagnostics(caught.value.diagnostics) + "\n"


@pytest.mark.parametrize("title", CASES)
def test_says(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = _said(CASES[title], tmp_path)
    if os.environ.get("UPDATE_GOLDEN"):
        told = {**_golden(), title: said}
        GOLDEN.write_text("".join(f"=== {t}\n{told[t]}" for t in CASES if t in told), encoding="utf-8")
    else:
        assert said == _golden()[title]


def test_sound_without_the_damage(tmp_path: Path) -> None:
    for content in (SOUND, "\ufeff" + SOUND, SOUND.replace("\n", "\r\n"), "---\n" + SOUND, SOUND + "...\n"):
        (tmp_path / "dev.yaml").write_bytes(content.encode())
        assert load_manifest(tmp_path / "dev.yaml", {}).manifest.models["chat"].aliases == ["demo"]


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40
    assert _golden().keys() == CASES.keys()
