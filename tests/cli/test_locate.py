"""`-f`: the files that a command reads, and the runner that is meant by them."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest

from runner.cli import validate
from runner.cli.locate import add_manifest, manifests
from runner.cli.main import main
from tests.control.scene import Scene
from tests.inspect.folders import write_llama

Capture = pytest.CaptureFixture[str]


def _files(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    add_manifest(parser)
    return [path.name for path in manifests(parser.parse_args(words))]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("a", "a"),
        ("-f a", "a"),
        ("-f a -f b", "a b"),
        ("--file a --file=b -fc", "a b c"),
        ("a -f b", "a b"),
        ("-f a b", "a b"),
        ("--json -f a b", "a b"),
        ("-f b --json -f a", "b a"),
    ],
)
def test_files_in_the_order_of_the_command_line(words: str, names: str) -> None:
    assert _files(*words.split()) == names.split()


def test_several_files_without_an_option_are_refused_with_the_way_to_merge_them(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        _files("a", "b")
    assert "write -f a -f b to merge them" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["apply", "plan", "validate"])
def test_no_file_at_all(command: str, capsys: Capture) -> None:
    assert main([command]) == 64
    assert "no manifest is given" in capsys.readouterr().err


BASE = "name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n"


def test_validate_checks_what_files_come_to_together(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "check_ports", lambda *_: ())  # other tests may have a port of that number
    write_llama(Path("chat"))
    Path("base.yaml").write_text(BASE)
    Path("prod.yaml").write_text("servers: {main: {port: 80800}}\n")
    Path("more.yaml").write_text("servers: {other: {port: 8081}}\n")
    assert main(["validate", "-f", "base.yaml", "-f", "more.yaml"]) == 0
    assert capsys.readouterr().out == "base.yaml + more.yaml: ok (1 model, 2 servers)\n"
    assert main(["-f", "base.yaml", "--file=prod.yaml", "validate"]) == 1
    assert capsys.readouterr().err.startswith("prod.yaml:1:24: servers.main.port: should be at most 65535")
    assert main(["validate", "base.yaml", "more.yaml"]) == 1, "an overlay alone is no manifest"


async def test_a_runner_is_found_by_its_manifest(up: Scene, capsys: Capture) -> None:
    over = up.folder / "over.yaml"
    over.write_text("name: other\n")
    files = ["-f", str(up.manifest)]
    assert await asyncio.to_thread(main, ["status", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifests"] == [str(up.manifest)]
    for command in (
        ["-f", str(up.manifest), "status"],
        ["wait", *files, "--for", "ready"],
        ["events", "--file", str(up.manifest)],
    ):
        assert await asyncio.to_thread(main, command) == 0
    assert await asyncio.to_thread(main, ["status", *files, "-f", str(over)]) == 1
    assert "there is no runner named 'other'" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["status", "other", *files]) == 1
    assert "the manifest is that of 'dev', not of 'other'" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["status", str(up.manifest)]) == 1
    assert f"write -f {up.manifest}" in capsys.readouterr().err


async def test_a_runner_is_found_by_a_manifest_that_is_broken_just_now(up: Scene, capsys: Capture) -> None:
    up.manifest.write_text("name: dev\nservers: [\n")
    await up.event("apply_failed")
    assert await asyncio.to_thread(main, ["status", "-f", str(up.manifest)]) == 3
    assert "dev" in capsys.readouterr().out


async def test_overlays_are_applied_and_planned_by_a_runner(up: Scene, capsys: Capture) -> None:
    over = up.folder / "over.yaml"
    over.write_text("models: {chat: {aliases: [gpt-z]}}\n")
    files = ["-f", str(up.manifest), "-f", str(over)]
    assert await asyncio.to_thread(main, ["plan", *files, "--detailed-exitcode"]) == 2
    assert await asyncio.to_thread(main, ["apply", *files]) == 0
    assert await asyncio.to_thread(main, ["plan", *files, "--detailed-exitcode"]) == 0
    assert up.live.deployments["chat"].spec.aliases == ("gpt-z",)
    over.write_text("models: {chat: {aliases: [gpt-y]}}\n")
    await up.event("applied", 3)
    assert up.live.deployments["chat"].spec.aliases == ("gpt-y",)
    assert up.runner is not None
    assert up.runner.status()["manifests"] == [str(up.manifest), str(over)]
