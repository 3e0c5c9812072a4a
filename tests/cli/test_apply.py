"""apply against a runner that is up in this process: what it hands over, prints, and returns."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from tests.control.asking import ask, text
from tests.control.scene import Scene
from tests.plan.test_render import sound

Capture = pytest.CaptureFixture[str]
CHAT = "chat: {source: ./models/chat, aliases: [gpt-x]}"


async def run(*arguments: object) -> int:
    """The exit code of a command, which runs in a thread: the runner has this one's loop."""
    code: int = await asyncio.to_thread(main, ["apply", *map(str, arguments)])
    return code


def beside(scene: Scene, models: str, servers: str = "") -> Path:
    """The same manifest with other models, in a file that nobody watches."""
    kept = scene.manifest
    scene.manifest = scene.folder / "beside.yaml"
    scene.write(models, servers)
    made, scene.manifest = scene.manifest, kept
    return made


def lines(capsys: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def drift(scene: Scene) -> Any:
    assert scene.runner is not None
    return scene.runner.status()["drift"]


async def test_it_is_handed_over_and_watched_to_its_end(up: Scene, capsys: Capture) -> None:
    file = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}")
    assert await run(file) == 0
    shown = capsys.readouterr().out
    assert "+ models.more  start" in shown
    assert "models.more: ready in" in shown
    assert "generation 2" in shown
    assert (await text(up, model="more")).startswith("base ")
    assert await run(file) == 0
    assert "Nothing to do" in capsys.readouterr().out


async def test_a_failure_is_told_and_exits_with_1(up: Scene, capsys: Capture) -> None:
    up.model("broken", refuse="no such architecture")
    assert await run(beside(up, "chat: {source: ./models/broken}")) == 1
    assert "no such architecture" in capsys.readouterr().err
    assert (await text(up, model="gpt-x")).startswith("base ")


async def test_events_are_lines_of_json_and_the_last_is_the_result(up: Scene, capsys: Capture) -> None:
    file = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}")
    assert await run("--json", file) == 0
    *events, result = lines(capsys)
    assert {"planned", "action_started", "action_done", "applied"} <= {e["event"] for e in events}
    assert (result["event"], result["ok"], result["changed"], result["generation"]) == ("result", True, True, 2)
    assert [a["target"] for a in sound(result["plan"])["actions"]] == ["servers.lm", "models.more"]
    assert await run("--json", file) == 0
    result = lines(capsys)[-1]
    assert (result["ok"], result["changed"], result["generation"], result["plan"]) == (True, False, 2, None)


async def test_a_failure_is_a_result_too(up: Scene, capsys: Capture) -> None:
    up.model("broken", refuse="no such architecture")
    assert await run("--json", beside(up, "chat: {source: ./models/broken}")) == 1
    result = lines(capsys)[-1]
    assert (result["event"], result["ok"], result["error"]["type"]) == ("result", False, "ControlError")
    assert "no such architecture" in result["error"]["message"]
    assert await run("--json", beside(up, "chat: {sauce: ./models/chat}")) == 1
    result = lines(capsys)[-1]
    assert [d["path"] for d in result["error"]["diagnostics"]] == ["models.chat.sauce"]


async def test_a_dry_run_changes_nothing_and_downloads_nothing(up: Scene, capsys: Capture) -> None:
    file = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}\nhub: {{source: org/name}}")
    before = len(up.events)
    assert await run("--dry-run", file) == 0
    shown = capsys.readouterr().out
    assert "models.more" in shown
    assert "Download: org/name" in shown
    assert "Dry run: nothing was changed" in shown
    assert await run("--dry-run", "--json", file) == 0
    (result,) = lines(capsys)
    assert (result["event"], result["changed"]) == ("result", False)
    assert len(sound(result["plan"])["actions"]) == 3
    assert len(up.events) == before


async def test_it_is_undone_when_it_takes_too_long(up: Scene, capsys: Capture) -> None:
    up.model("slow", load_seconds=60)
    assert await run("--timeout", "0.3s", beside(up, f"{CHAT}\nslow: {{source: ./models/slow}}")) == 1
    shown = capsys.readouterr().err
    assert "not done within 0.3 s" in shown
    assert "What ran before goes on as it was" in shown
    assert list(up.live.deployments) == ["chat"]
    assert not up.live.coming
    assert (await ask(up, model="slow")).status_code == 404


async def test_without_waiting_it_returns_with_the_plan_and_it_goes_on(up: Scene, capsys: Capture) -> None:
    up.model("slow", load_seconds=0.5)
    assert await run("--no-wait", "--json", beside(up, f"{CHAT}\nslow: {{source: ./models/slow}}")) == 0
    result = lines(capsys)[-1]
    assert (result["event"], result["ok"], result["changed"]) == ("result", True, None)
    assert "slow" not in up.live.deployments
    await up.event("applied", 2)
    assert "slow" in up.live.deployments


async def test_a_target_leaves_the_rest_and_status_says_so(up: Scene, capsys: Capture) -> None:
    up.model("other")
    file = beside(up, "chat: {source: ./models/other}\nmore: {source: ./models/chat}")
    engine = up.live.deployments["chat"].engine.pid
    assert await run("--target", "more", file) == 0
    shown = capsys.readouterr().out
    assert "Left out by --target more: replace models.chat" in shown
    assert up.live.deployments["chat"].engine.pid == engine
    assert (await text(up, model="more")).startswith("base ")
    assert drift(up) == "--target more left out: replace models.chat"
    assert up.runner is not None
    assert not up.runner.status()["in_sync"]

    def status() -> int:
        return main(["status", "dev"])

    assert await asyncio.to_thread(status) == 3
    assert "`mlx-run apply` makes it whole" in capsys.readouterr().out
    assert await run(file) == 0
    assert up.live.deployments["chat"].engine.pid != engine
    assert drift(up) == ""
    assert up.runner.status()["in_sync"]


async def test_later_edits_stay_within_the_targets_until_an_apply_without(up: Scene) -> None:
    up.model("other")
    more = "more: {source: ./models/chat, aliases: [%s]}"
    up.runner._reconciler.followed.watching = True  # type: ignore[union-attr]
    file = beside(up, f"chat: {{source: ./models/other}}\n{more % 'a'}")
    assert await run("--target", "more", file) == 0
    engine = up.live.deployments["chat"].engine.pid
    beside(up, f"chat: {{source: ./models/other}}\n{more % 'b'}")
    await up.event("applied", 3)
    assert (await text(up, model="b")).startswith("base ")
    assert up.live.deployments["chat"].engine.pid == engine
    assert "replace models.chat" in drift(up)
    beside(up, f"{CHAT}\n{more % 'b'}")  # what was left out is no more
    await up.until(lambda: drift(up) == "")
    beside(up, f"chat: {{source: ./models/other}}\n{more % 'b'}")
    await up.event("applied", 4)
    assert up.live.deployments["chat"].engine.pid != engine, "and so nothing is held back any more"


async def test_a_target_that_is_none_and_one_that_cannot_be_alone(up: Scene, capsys: Capture) -> None:
    file = beside(up, "chat: {source: ./models/chat}\nmore: {source: ./models/chat, aliases: [gpt-x]}")
    assert await run("--target", "mroe", file) == 1
    assert "Models: chat, more." in capsys.readouterr().err
    assert await run("--target", "more", file) == 1
    assert "'gpt-x' would mean both models.chat and models.more" in capsys.readouterr().err
    assert await run("--target", "more", "--target", "models.chat", file) == 0
    assert drift(up) == ""


async def test_without_pruning_what_is_gone_from_the_manifest_stays(up: Scene, capsys: Capture) -> None:
    file = beside(up, "new: {source: ./models/chat, batching: {max_rows: 4}}")
    assert await run("--prune=false", file) == 0
    assert sorted(up.live.deployments) == ["chat", "new"]
    assert (await text(up, model="chat")).startswith("base ")
    assert (await text(up, model="new")).startswith("base ")
    assert drift(up) == "--prune=false left out: update servers.lm, stop models.chat"
    assert await run(file) == 0
    assert list(up.live.deployments) == ["new"]
    assert (await ask(up, model="chat")).status_code == 404


async def test_only_what_a_target_needs_is_downloaded(up: Scene) -> None:
    file = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}\nhub: {{source: org/name}}")
    assert await run("--target", "more", file) == 0
    assert [e for e in up.events if e["event"] == "downloading"] == []
    assert drift(up) == "--target more left out: update servers.lm, start models.hub"


async def test_a_generation_that_is_not_current_any_more_is_refused(up: Scene, capsys: Capture) -> None:
    file = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}")
    assert await run("--generation", 7, file) == 1
    assert "generation 1 is current" in capsys.readouterr().err
    assert await run("--generation", 1, file) == 0


async def test_two_applies_take_turns(up: Scene) -> None:
    up.model("slow", load_seconds=0.3)
    first = beside(up, f"{CHAT}\nslow: {{source: ./models/slow}}").rename(up.folder / "first.yaml")
    second = beside(up, f"{CHAT}\nmore: {{source: ./models/chat}}")
    assert await asyncio.gather(run(first), run(second)) == [0, 0]
    generations = [e["generation"] for e in up.events if e["event"] == "applied"]
    assert generations == [1, 2, 3]
    names = [e["event"] for e in up.events if e["event"] in ("planned", "applied")]
    assert names == ["planned", "applied"] * 3


@pytest.mark.parametrize(
    "arguments", [["--prune=maybe"], ["--timeout", "soon"], ["--target"], ["--wait=yes"], ["--generation", "x"]]
)
def test_arguments_that_are_none(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["apply", "dev.yaml", *arguments])
    assert exit_.value.code == 64
    assert "usage: mlx-run apply" in capsys.readouterr().err
