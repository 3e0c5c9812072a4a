"""An engine that died of memory is reported as such, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.control import postmortem
from tests.control.asking import ask
from tests.control.scene import Scene

METAL = "libc++abi: terminating: [METAL] Command buffer execution failed: Insufficient Memory "
METAL += "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)\n"


@pytest.mark.parametrize(
    ("code", "said", "killed_by_us", "over", "kills", "expected"),
    [
        (-9, "", False, "the group's limit", 1, "the group's limit"),
        (-9, "", True, "the group's limit", 1, ""),
        (1, "", False, "a compiler was ended in the group", 0, ""),
        (-6, METAL, False, "", 0, "kIOGPUCommandBufferCallbackErrorOutOfMemory"),
        (3, "RuntimeError: [malloc_or_wait] Unable to allocate 5000000000 bytes.\n", False, "", 0, "out of memory"),
        (-9, "", False, "", 1, "the kernel ended the engine"),
        (-9, "", False, "", 0, ""),
        (-9, METAL, True, "", 1, ""),
        (-11, "Segmentation fault\n", False, "", 1, ""),
        (0, METAL, False, "", 1, ""),
    ],
)
def test_what_an_end_has_to_do_with_memory(
    code: int,
    said: str,
    killed_by_us: bool,
    over: str,
    kills: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "chat.log"
    log.write_text("earlier: out of memory\n")
    before = log.stat().st_size
    with log.open("a") as file:
        file.write(said)
    monkeypatch.setattr(postmortem, "oom_kills", lambda: 5 + kills)
    found = postmortem.lack_of_memory(
        code, killed_by_us=killed_by_us, over=over, kills_before=5, log=log, written_before=before
    )
    assert expected in found
    assert bool(found) == bool(expected)


def test_kills_are_counted_where_the_kernel_says_so() -> None:
    assert postmortem.oom_kills() >= 0


@pytest.mark.parametrize("load", ["eager", "on_demand"])
async def test_said_in_conditions_and_events(load: str, scene: Scene) -> None:
    scene.model("chat", abort_after=6, last_words=METAL)
    scene.write(f"chat: {{source: ./models/chat, load: {load}}}")
    scene.start()
    await scene.event("applied")
    answers = [await ask(scene, max_tokens=4) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 500]
    found = await scene.event("engine_out_of_memory")
    assert "OutOfMemory" in found["reason"]
    degraded = scene.live.model_statuses()[0]["conditions"]["Degraded"]
    assert (degraded["status"], "OutOfMemory" in degraded["message"]) == ("true", True)


async def test_an_engine_that_used_too_much_says_so(scene: Scene) -> None:
    scene.model("chat", overrun_after=6)
    scene.write("chat: {source: ./models/chat}")
    scene.start()
    await scene.event("applied")
    await ask(scene, max_tokens=4)
    await ask(scene, max_tokens=4)
    found = await scene.event("engine_over_memory")
    assert (found["used"], found["limit"]) == (200, 100)
    await scene.event("engine_restarted")
    assert (await ask(scene, max_tokens=4)).status_code == 200
