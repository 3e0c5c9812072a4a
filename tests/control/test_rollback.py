"""Generations of a real runner: what is kept, going back, and what undoes that."""

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from runner.control.generations import Generation, Generations
from runner.control.ledger import Cause, load_committed
from runner.errors import ListenerError, RunnerError, StaleGeneration
from tests.control.asking import ONE, ask, pid, text
from tests.control.scene import Scene, free_port

TWO = "chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate, shout: ./adapters/shout}}"
ALIAS = "chat: {source: ./models/chat, aliases: [again]}"


def kept(scene: Scene) -> list[Generation]:
    damaged: list[str] = []
    found = Generations(scene.folder / "state" / "dev" / "generations", lambda path, why: damaged.append(why)).all()
    assert not damaged
    return found


async def roll_back(scene: Scene, number: int | None = None, generation: int | None = None) -> Any:
    assert scene.runner is not None
    return await scene.runner._reconciler.roll_back(number, Cause("rollback", "jo", generation))


async def look(scene: Scene) -> None:
    """A pass though nothing was edited, as when another try is due."""
    assert scene.runner is not None
    await scene.runner._reconciler.reconcile()


async def applied(scene: Scene, *versions: str) -> None:
    """Start with the first version of the manifest, then edit it to each of the others."""
    scene.write(versions[0])
    scene.start()
    await scene.event("applied")
    for count, version in enumerate(versions[1:], 2):
        scene.write(version)
        await scene.event("applied", count)


async def stop(scene: Scene) -> None:
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._stop.set()
    await scene.running
    scene.events.clear()


async def adapters(scene: Scene) -> list[str]:
    return [a.name for a in scene.live.deployments["chat"].spec.adapters]


def status(scene: Scene) -> dict[str, Any]:
    assert scene.runner is not None
    return scene.runner.status()


async def test_each_applied_spec_is_kept_with_who_and_why(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    first, second = kept(scene)
    assert (first.number, first.via, first.ok) == (1, "start", True)
    assert (second.number, second.via, second.ok) == (2, "watch", True)
    assert first.actions == (("open", "servers.lm"), ("start", "models.chat"))
    assert second.actions == (("update", "models.chat"),)
    assert second.manifest == (str(scene.manifest),)
    assert first.digest != second.digest
    assert first.user == second.user != ""
    assert status(scene)["digest"] == second.digest


async def test_what_was_tried_in_vain_is_kept_with_the_reason(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    await applied(scene, ONE)
    for _ in range(2):
        scene.write("chat: {source: ./models/broken}")
        await scene.until(lambda: scene.events[-1]["event"] == "apply_failed")
        scene.write(ONE)
        await scene.until(lambda: scene.events[-1]["event"] == "unchanged")
    first, failed = kept(scene)
    assert first.ok
    assert not failed.ok
    assert "no such architecture" in failed.error
    assert failed.attempts == 2, "the same again is one entry"
    assert status(scene)["generation"] == 1


async def test_going_back_is_a_new_generation_that_an_untouched_manifest_does_not_undo(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    engine = pid(scene)
    result = await roll_back(scene)
    assert result.generation == 3
    assert await adapters(scene) == ["pirate"]
    assert pid(scene) == engine, "an adapter goes in place"
    last = kept(scene)[-1]
    assert (last.via, last.user, last.restores, last.manifest_generation) == ("rollback", "jo", 1, 2)
    assert last.digest == kept(scene)[0].digest
    now = status(scene)
    assert now["drift"] == "rolled back to 1; the manifest was last applied as 2"
    assert now["settled"]
    assert not now["in_sync"]
    scene.write(TWO)  # written again as it was
    await look(scene)
    assert scene.events[-1]["event"] == "unchanged"
    assert scene.events[-2]["event"] == "held"
    assert await adapters(scene) == ["pirate"]
    scene.write(TWO, top="# a comment is an edit")
    await scene.event("applied", 4)
    assert await adapters(scene) == ["pirate", "shout"]
    assert status(scene)["in_sync"]
    assert not status(scene)["drift"]


async def test_a_typo_that_is_taken_back_does_not_undo_it(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    await applied(scene, ONE, TWO)
    await roll_back(scene)
    for count, wrong in enumerate(("chat: {", "chat: {source: ./models/broken}"), 1):
        scene.write(wrong)
        await scene.event("apply_failed", count)
        scene.write(TWO)
        await scene.event("held", count)
        await scene.until(lambda: scene.events[-1]["event"] == "unchanged")
        assert await adapters(scene) == ["pirate"]
        assert status(scene)["drift"] == "rolled back to 1; the manifest was last applied as 2"


async def test_a_restart_does_not_undo_it_and_an_edit_meanwhile_does(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    await roll_back(scene)
    await stop(scene)
    scene.start()
    assert (await scene.event("applied"))["generation"] == 3, "a restart with the same is no new generation"
    assert await adapters(scene) == ["pirate"]
    assert status(scene)["drift"]
    assert len(kept(scene)) == 3
    await stop(scene)
    scene.write(ALIAS)
    scene.start()
    assert (await scene.event("applied"))["generation"] == 4
    assert kept(scene)[-1].via == "start"
    assert await adapters(scene) == []


async def test_an_explicit_apply_undoes_it(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    await roll_back(scene)
    assert scene.runner is not None
    result = await scene.runner._reconciler.apply((scene.manifest,), Cause("apply", "jo"))
    assert result.error is None
    assert await adapters(scene) == ["pirate", "shout"]
    assert not status(scene)["drift"]
    assert kept(scene)[-1].via == "apply"


async def test_the_edit_to_what_was_rolled_back_to_ends_the_drift(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    await roll_back(scene)
    scene.write(ONE)
    await scene.until(lambda: scene.events[-1]["event"] == "unchanged")
    assert not status(scene)["drift"]
    assert kept(scene)[-1].via == "watch"
    scene.write(TWO)
    await scene.event("applied", 4)
    assert await adapters(scene) == ["pirate", "shout"], "it is not what it was rolled back from any more"


async def test_an_edit_that_nobody_has_looked_at_yet_is_not_lost(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    scene.write(ALIAS)  # and at once, before the watch sees it:
    await roll_back(scene)
    await scene.event("applied", 4)
    assert (await text(scene, model="again")).startswith("base ")


async def test_back_and_forth(scene: Scene) -> None:
    await applied(scene, ONE, TWO, ALIAS)
    await roll_back(scene, 1)
    await roll_back(scene, 2)
    assert await adapters(scene) == ["pirate", "shout"]
    assert status(scene)["drift"] == "rolled back to 2; the manifest was last applied as 3"
    await roll_back(scene)  # the one before: 4, which is 1 again
    assert await adapters(scene) == ["pirate"]
    assert [one.restores for one in kept(scene)] == [0, 0, 0, 1, 2, 4]


async def test_going_back_over_a_failed_edit(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    await applied(scene, ONE, TWO)
    scene.write("chat: {source: ./models/broken}")
    await scene.event("apply_failed")
    await roll_back(scene)
    assert await adapters(scene) == ["pirate"], "the failed one was never current"
    await look(scene)
    await scene.event("held")
    assert status(scene)["manifest_error"] == ""


async def test_a_broken_manifest_is_held_too(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    scene.write("chat: {sauce: ./models/chat}")
    await scene.event("apply_failed")
    await roll_back(scene)
    await look(scene)
    await scene.event("held")
    scene.write("chat: {sauce: ./models/other}")
    await scene.event("apply_failed", 2)


async def test_numbers_that_mean_nothing(scene: Scene) -> None:
    await applied(scene, ONE)
    with pytest.raises(RunnerError, match="no generation before 1, the current one"):
        await roll_back(scene)
    scene.write(TWO)
    await scene.event("applied", 2)
    for number, reason in [
        (7, "there is no generation 7\nThere are: 1, 2."),
        (-1, "there is no generation -1"),
        (2, "generation 2 is the current one"),
    ]:
        with pytest.raises(RunnerError, match=reason):
            await roll_back(scene, number)


async def test_files_that_changed_are_named_and_nothing_is_done(scene: Scene) -> None:
    await applied(scene, TWO, ALIAS)
    scene.adapter("pirate", version=9)
    shutil.rmtree(scene.folder / "adapters" / "shout")
    with pytest.raises(RunnerError) as refused:
        await roll_back(scene)
    said = str(refused.value)
    assert "generation 1 cannot be had again" in said
    assert f"models.chat.adapters.pirate: the files in {scene.folder}/adapters/pirate changed" in said
    assert f"models.chat.adapters.shout: there is no folder {scene.folder}/adapters/shout" in said
    assert len(kept(scene)) == 2
    assert (await text(scene, model="again")).startswith("base ")
    assert status(scene)["in_sync"]


async def test_a_rollback_that_fails_leaves_what_ran_and_the_manifest_in_effect(scene: Scene) -> None:
    taken = free_port()
    scene.write(ONE, servers=f"more: {{port: {taken}}}")
    scene.start()
    await scene.event("applied")
    scene.write(TWO)
    await scene.event("applied", 2)
    await scene.live.settle()
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(ListenerError, match=str(taken)):
        await roll_back(scene)
    assert (await scene.event("rollback_failed"))["restores"] == 1
    failed = kept(scene)[-1]
    assert (failed.via, failed.ok, failed.restores) == ("rollback", False, 1)
    assert await adapters(scene) == ["pirate", "shout"]
    assert status(scene)["in_sync"]
    assert (await roll_back(scene, 1)).generation == 4


async def test_the_source_comes_back_by_surge(scene: Scene) -> None:
    scene.model("other")
    await applied(scene, ONE, "chat: {source: ./models/other}")
    before = pid(scene)
    await roll_back(scene)
    assert pid(scene) != before
    assert scene.live.deployments["chat"].spec.source == "./models/chat"
    assert (await text(scene, adapter_name="pirate")) != ""


async def test_a_request_for_another_generation_is_refused(scene: Scene) -> None:
    await applied(scene, ONE, TWO)
    assert scene.runner is not None
    with pytest.raises(StaleGeneration, match=r"generation 2 is current \(by .*, watch\), and this was made for"):
        await roll_back(scene, 1, generation=1)
    with pytest.raises(StaleGeneration):
        await scene.runner._reconciler.apply((scene.folder / "other.yaml",), Cause("apply", "jo", 1))
    assert scene.runner._reconciler.followed.paths == (scene.manifest,)
    assert len(kept(scene)) == 2
    assert status(scene)["in_sync"]
    assert (await roll_back(scene, 1, generation=2)).generation == 3


async def test_two_at_once_never_interleave_and_the_second_of_one_plan_is_refused(scene: Scene) -> None:
    scene.model("slow", load_seconds=0.2)
    await applied(scene, ONE, TWO, "chat: {source: ./models/slow}")
    results = await asyncio.gather(*(roll_back(scene, n, generation=3) for n in (1, 2, 1)), return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["Pass", "StaleGeneration", "StaleGeneration"]
    order = [e["event"] for e in scene.events if e["event"] in ("rolling_back", "applied")][3:]
    assert order == ["rolling_back", "applied"]
    assert await adapters(scene) == ["pirate"]


async def test_a_generation_that_cannot_be_written_is_not_applied(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await applied(scene, ONE)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("runner.control.generations.write_atomically", full)
        scene.write(TWO)
        failed = await scene.event("apply_failed")
    assert "generation 2 cannot be kept in" in failed["error"]
    assert "No space left on device" in failed["error"]
    assert await adapters(scene) == ["pirate"]
    assert (await ask(scene, adapter_name="shout")).status_code == 404


KEYS = "lan: {{port: {port}, auth: {{api_keys: [{keys}]}}}}"


async def test_no_key_reaches_the_state_folder_and_it_comes_back_from_where_it_was(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAN_KEY", "sk-variable")
    (scene.folder / "lan.key").write_text("sk-hunter2\n")
    locked = KEYS.format(port=free_port(), keys='"${file:lan.key}", "${LAN_KEY}", sk-literal')
    scene.write(ONE, servers=locked)
    scene.start()
    await scene.event("applied")
    scene.write(ONE)
    await scene.event("applied", 2)
    for file in (scene.folder / "state").rglob("*"):
        if file.is_file():
            assert not any(key in file.read_bytes() for key in (b"hunter2", b"sk-variable", b"sk-literal")), file
    with pytest.raises(RunnerError, match=r"servers\.lan: a key written in the manifest"):
        await roll_back(scene, 1)
    scene.write(ONE, servers=locked.replace(", sk-literal", ""))
    await scene.event("applied", 3)
    scene.write(ONE)
    await scene.event("applied", 4)
    await roll_back(scene, 3)
    assert scene.live.listeners["lan"].spec.api_keys == ("sk-hunter2", "sk-variable")
    await roll_back(scene, 4)
    (scene.folder / "lan.key").write_text("sk-another\n")
    with pytest.raises(RunnerError) as refused:
        await roll_back(scene, 3)
    assert f"servers.lan: the file {scene.folder}/lan.key" in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_without_a_runner_the_last_generation_can_be_compared_with(scene: Scene) -> None:
    (scene.folder / "lan.key").write_text("sk-hunter2\n")
    scene.write(ONE, servers=KEYS.format(port=free_port(), keys='"${file:lan.key}"'))
    scene.start()
    await scene.event("applied")
    desired = scene.live.committed
    folder = scene.live.folder
    await stop(scene)
    found = load_committed(folder, ["sk-hunter2"])
    assert found is not None
    assert found[0].number == 1
    assert found[1] == desired
    other = load_committed(folder, [])
    assert other is not None
    assert other[1].models == desired.models
    assert other[1].listeners[1].api_keys not in ((), ("sk-hunter2",))
    (Path(folder.generations) / "00000001.json").write_text("{")
    assert load_committed(folder, []) is None
