import argparse
import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.cli.text import duration
from runner.cli.wait import parse, unmet
from tests.cli.attach import attached
from tests.control.scene import Scene


def model(name: str, state: str, **fields: object) -> dict[str, Any]:
    ready = {"status": "true" if state == "ready" else "false", "reason": state.capitalize(), "message": ""}
    conditions = {"Ready": ready, "Degraded": {"status": "false", "reason": "AsDeclared", "message": ""}}
    return {
        "name": name,
        "aliases": [],
        "state": state,
        "stage": "",
        "last_error": "",
        "conditions": conditions,
        **fields,
    }


def status(*models: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {
        "models": list(models),
        "in_sync": True,
        "settled": True,
        "drift": "",
        "manifest_error": "",
        "stopping": False,
        **fields,
    }


@pytest.mark.parametrize(
    "arguments",
    [["ready"], ["ready", "gpt-x", "chat"], ["sync"], ["condition=Ready", "chat"], ["condition=Degraded=false"]],
)
async def test_what_is_so_already_returns_at_once(up: Scene, arguments: list[str]) -> None:
    assert await asyncio.to_thread(main, ["wait", "dev", "--for", *arguments]) == 0


async def test_returns_when_a_model_is_ready_that_is_not_there_yet(up: Scene) -> None:
    up.model("late", load_seconds=0.3)
    waiting = asyncio.create_task(asyncio.to_thread(main, ["wait", "--for", "ready", "late", "--timeout", "15s"]))
    await attached(up)
    up.write("chat: {source: ./models/chat}\nlate: {source: ./models/late}")
    assert await waiting == 0
    assert up.live.deployments["late"].state == "ready"


def test_waits_for_a_runner_that_is_not_up_yet(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["wait", "later", "--for", "ready", "--timeout", "0.3"]) == 1
    assert time.monotonic() - started >= 0.3
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "there is no runner named 'later' yet; waiting for it"
    assert shown[1] == "error: there is no runner named 'later'"


async def test_finds_a_runner_that_comes_up_meanwhile(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    waiting = asyncio.create_task(asyncio.to_thread(main, ["wait", "dev", "--for", "ready", "--timeout", "20s"]))
    scene.write("chat: {source: ./models/chat}")
    scene.start()
    assert await waiting == 0


async def test_returns_when_an_engine_is_back(up: Scene) -> None:
    killed = up.live.deployments["chat"].engine.pid
    os.kill(killed, signal.SIGKILL)
    await up.event("engine_died")
    assert await asyncio.to_thread(main, ["wait", "--for", "ready", "--timeout", "15s"]) == 0
    assert up.live.deployments["chat"].engine.pid != killed


async def test_after_the_timeout_it_says_what_was_missing(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert await asyncio.to_thread(main, ["wait", "--for", "ready", "chatt", "--timeout", "0.3s"]) == 1
    assert time.monotonic() - began >= 0.3
    assert capsys.readouterr().err == "error: not within 0.3 s: there is no model 'chatt' (models: chat)\n"


async def test_a_wrong_manifest_is_the_reason(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    up.write("chat: {sauce: ./models/chat}")
    await up.event("apply_failed")
    assert await asyncio.to_thread(main, ["wait", "--for", "sync", "--timeout", "0"]) == 1
    shown = capsys.readouterr().err
    assert "not within 0 s" in shown
    assert "sauce" in shown
    assert await asyncio.to_thread(main, ["wait", "--for", "ready", "chat", "--timeout", "0"]) == 0


async def test_a_runner_that_stops_first(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert up.runner is not None
    waiting = asyncio.create_task(asyncio.to_thread(main, ["wait", "--for", "ready", "nobody"]))
    await attached(up)
    up.runner._stop.set()
    assert await asyncio.wait_for(waiting, 15) == 1
    assert "the runner 'dev' stopped first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["redy"], ["sync", "chat"], ["condition=Redy"], ["condition=Ready=maybe"], ["condition=Ready=true=1"]]
)
def test_a_condition_that_is_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wait", "--for", *arguments]) == 64
    assert "--for ready [MODEL]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("now", "models", "why"),
    [
        (status(), [], ""),
        (status(model("a", "ready"), model("b", "loading", stage="weights")), [],
         "b: Ready is false (Loading, weights)"),
        (status(model("a", "ready"), model("b", "loading")), ["a"], ""),
        (status(model("a", "ready"), settled=False, in_sync=False), [], "the manifest has not settled yet"),
        (status(model("a", "ready"), settled=False, in_sync=False), ["a"], ""),
        (status(model("a", "backoff", last_error="it ended")), ["a"], "a: Ready is false (Backoff)\nit ended"),
        (status(settled=False, in_sync=False, manifest_error="no such file"), ["a"],
         "there is no model 'a' (models: none)\nno such file"),
        (status(model("a", "ready"), stopping=True), ["a"], "the runner is stopping"),
    ],
)  # fmt: skip
def test_reasons(now: dict[str, Any], models: list[str], why: str) -> None:
    assert unmet(now, parse(["ready", *models])) == why


def test_conditions() -> None:
    now = status(model("a", "ready"), model("b", "loading"), settled=False)
    assert unmet(now, parse(["condition=ready", "a"])) == ""
    assert unmet(now, parse(["condition=Ready"])) == "b: Ready is false (Loading)"
    assert unmet(now, parse(["condition=Ready=false", "b"])) == ""
    assert unmet(now, parse(["condition=Degraded", "a"])) == "a: Degraded is false (AsDeclared)"
    assert unmet(now, parse(["condition=degraded=FALSE"])) == ""


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("0.5", 0.5), ("5m", 300), ("1h30m", 5400), ("1m2.5s", 62.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "5 m", "1d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a duration, such as 30s"):
        duration(text)
