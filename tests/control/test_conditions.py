import asyncio
import json
import os
import shutil
import signal
from typing import Any

import pytest

from runner.control.conditions import TYPES, Conditions, Wanted
from runner.control.health import Health
from runner.control.model_status import absent, status_of
from runner.errors import Diagnostic
from tests.control.asking import ONE, pid
from tests.control.scene import Scene


class Events:
    """What was emitted, as (condition, status, reason)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def emit(self, event: str, **fields: Any) -> None:
        assert event == "condition"
        self.seen.append((fields["condition"], fields["status"], fields["reason"]))


def diagnostic(code: str, path: str) -> Diagnostic:
    return Diagnostic("dev.yaml", 1, 1, path, f"{code} it is", code=code)


def test_since_changes_with_the_status_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr("runner.control.conditions.time.time", lambda: next(clock))
    events = Events()
    conditions = Conditions(lambda: "models.a", events.emit, {"Ready": ("false", "NotStarted")})
    conditions.set("Ready", "false", "Loading", "weights")
    assert conditions["Ready"] == ("false", "Loading", "weights", 1.0)
    conditions.set("Ready", "true", "GeneratedToken")
    assert conditions["Ready"].since == 2.0
    conditions.set("Ready", "true", "Adopted")
    assert conditions["Ready"] == ("true", "Adopted", "", 2.0)
    assert events.seen == [("Ready", "true", "GeneratedToken")]
    assert conditions.as_json["Ready"]["since"] == 2.0


def statuses(wanted: Wanted, name: str) -> list[str]:
    return [f"{c['status']} {c['reason']}" for c in wanted.of(name).as_json.values()]


def test_what_is_wrong_with_a_manifest_is_told_of_the_models_that_it_is_about() -> None:
    events = Events()
    wanted = Wanted(events.emit)
    wanted.can_be_had(["a", "ab"])
    assert statuses(wanted, "a") == ["true SourcesFound", "true OnThisMachine", "true WithinMemory"]
    assert events.seen == [], "a first look that finds all well is no news"
    wanted.wrong(["a", "ab", "c"], [diagnostic("E602", "models.a.adapters.x"), diagnostic("E604", "models.c")])
    assert statuses(wanted, "a")[0] == "false Incomplete"
    assert statuses(wanted, "ab")[0] == "true SourcesFound"
    assert statuses(wanted, "c")[:2] == ["unknown NotLookedAt", "false NotDownloaded"]
    wanted.wrong(["a", "ab"], [diagnostic("E702", "memory.limit"), diagnostic("E201", "models.ab.batching[0]")])
    assert statuses(wanted, "ab") == ["false Invalid", "true OnThisMachine", "false TooLarge"]
    assert statuses(wanted, "a")[2] == "false TooLarge"
    wanted.can_be_had(["a"])
    assert events.seen[-2:] == [("Resolved", "true", "SourcesFound"), ("Fits", "true", "WithinMemory")]
    wanted.not_downloaded(["c"], "Downloading", "org/name at main")
    assert wanted.of("c")["Downloaded"].message == "org/name at main"
    wanted.keep(["a"])
    assert wanted.names == ("a",)


async def test_an_engine_that_died_degrades_until_its_successor_is_stable() -> None:
    events = Events()
    health = Health(lambda: "models.a", events.emit, stable=0.05)
    health.follow("ready", "", adopted=False)
    health.follow("backoff", "it ended", adopted=False)
    health.died("it ended")
    assert health.conditions["Ready"][:3] == ("false", "BackingOff", "it ended")
    assert health.conditions["Degraded"][:3] == ("true", "EngineDied", "it ended")
    health.follow("ready", "", adopted=False)
    health.came_back()
    health.behind("")
    assert health.conditions["Degraded"][:2] == ("true", "RecentlyRestarted")
    async with asyncio.timeout(20):
        while health.conditions["Degraded"].status == "true":
            await asyncio.sleep(0.01)
    assert health.conditions["Degraded"].reason == "AsDeclared"
    assert [seen for seen in events.seen if seen[0] == "Degraded"] == [
        ("Degraded", "true", "EngineDied"),
        ("Degraded", "false", "AsDeclared"),
    ]


def test_what_is_wrong_with_one_is_no_matter_of_another_that_its_name_begins_with() -> None:
    wanted = Wanted(Events().emit)
    wanted.wrong(["qwen2", "qwen2.5"], [Diagnostic("dev.yaml", 1, 1, "models.qwen2.5.source", "is gone", code="E602")])
    assert wanted.of("qwen2.5")["Resolved"].status == "false"
    assert wanted.of("qwen2")["Resolved"].status == "unknown"


def test_several_reasons_to_be_degraded() -> None:
    health = Health(lambda: "models.a", Events().emit, stable=1)
    health.behind("a wish")
    assert health.conditions["Degraded"].reason == "EditNotInEffect"
    health.sources_changed("other files")
    assert health.conditions["Degraded"].reason == "SourceChanged"
    health.sources_changed("")
    health.behind("")
    assert health.conditions["Degraded"].status == "false"


def held(scene: Scene, name: str = "chat") -> dict[str, str]:
    """Status and reason of each condition that is not as one wishes."""
    assert scene.runner is not None
    (model,) = [m for m in scene.runner.status()["models"] if m["name"] == name]
    assert tuple(model["conditions"]) == TYPES
    good = {**dict.fromkeys(TYPES, "true"), "Degraded": "false"}
    return {k: f"{c['status']} {c['reason']}" for k, c in model["conditions"].items() if c["status"] != good[k]}


async def test_from_start_over_a_crash_and_a_broken_edit(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    assert held(scene) == {}
    said = [(e["condition"], e["status"], e["reason"]) for e in scene.events if e["event"] == "condition"]
    assert said == [("Loaded", "true", "WeightsInMemory"), ("Ready", "true", "GeneratedToken")]
    os.kill(pid(scene), signal.SIGKILL)
    await scene.event("engine_restarted")
    assert held(scene) == {"Degraded": "true RecentlyRestarted"}
    scene.write("chat: {source: ./models/none}\nnew: {source: ./models/nowhere}")
    await scene.event("apply_failed")
    assert held(scene)["Resolved"] == "false NotFound"
    assert held(scene, "new") == {
        "Resolved": "false NotFound", "Downloaded": "unknown NotLookedAt", "Fits": "unknown NotLookedAt",
        "Loaded": "false NotStarted", "Ready": "false NotStarted",
    }  # fmt: skip
    scene.write("chat: {sauce: ./models/chat}")
    await scene.event("apply_failed", 2)
    assert scene.runner is not None
    assert [m["name"] for m in scene.runner.status()["models"]] == ["chat"], "nobody knows what it wants"
    scene.model("other")
    scene.write("chat: {source: ./models/other}")
    await scene.event("applied", 2)
    assert held(scene) == {}, "what was planned anew has not died"


async def test_an_edit_that_fails_leaves_those_behind_that_it_was_about(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    scene.write("chat: {source: ./models/chat}\nother: {source: ./models/chat}")
    scene.start()
    await scene.event("applied")
    scene.write("chat: {source: ./models/broken}\nother: {source: ./models/chat}")
    await scene.event("apply_failed")
    assert held(scene) == {"Degraded": "true EditNotInEffect"}
    assert held(scene, "other") == {}
    assert scene.runner is not None
    (chat, _) = scene.runner.status()["models"]
    assert "no such architecture" in chat["conditions"]["Degraded"]["message"]
    scene.write("chat: {source: ./models/chat}\nother: {source: ./models/chat}")
    await scene.until(lambda: held(scene) == {})


async def test_a_download_is_seen(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(scene.folder / "hub"))
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.write(f"{ONE}\nother: {{source: org/name}}")
    await scene.event("apply_failed")
    said = [e for e in scene.events if e["event"] == "condition" and e["target"] == "models.other"]
    assert [(e["status"], e["reason"]) for e in said] == [("false", "Downloading")]
    assert said[0]["message"] == "org/name at main"
    assert held(scene, "other")["Downloaded"] == "false DownloadFailed"


async def test_a_model_without_a_deployment_has_the_same_fields(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    real = status_of(scene.live.deployments["chat"])
    nothing = absent("chat")
    assert nothing.keys() == real.keys()
    kinds = {
        k for k in real if real[k] is not None and nothing[k] is not None and type(real[k]) is not type(nothing[k])
    }
    assert not kinds
    json.dumps(nothing)
    shutil.rmtree(scene.folder / "adapters" / "pirate")
    await scene.event("apply_failed")
    assert held(scene)["Resolved"] == "false NotFound"
