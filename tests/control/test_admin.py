"""The admin API over a real runner: what it changes is live, is said to be drift, and goes with the next apply or
edit."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.control.asking import ONE, ask, in_flight, pid, text
from tests.control.scene import Scene

OTHER = {"model": "other", "source": "./models/other"}


@pytest.fixture
async def admin(scene: Scene) -> Scene:
    """One model, served by a server with the admin API."""
    scene.model("other")
    scene.lm = scene.lm.replace("}", ", apis: [openai, admin]}")
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    return scene


async def post(scene: Scene, path: str, body: dict[str, Any] | None = None, status: int = 200) -> Any:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        answer = await client.post(path, json=body or {})
    assert answer.status_code == status, answer.text
    return answer.json()


async def status(scene: Scene) -> Any:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        return (await client.get("/v1/status")).json()


async def test_a_model_is_loaded_used_and_unloaded(admin: Scene) -> None:
    done = await post(admin, "/v1/models/load", OTHER)
    assert [(a["action"], a["target"]) for a in done["plan"]["actions"][-1:]] == [("start", "models.other")]
    assert done["generation"] == 2
    assert done["drift"] == ["models.other loaded"]
    assert (await text(admin, model="other")).startswith("base ")
    again = await post(admin, "/v1/models/load", {"model": "other"})
    assert (again["generation"], again["plan"]["actions"]) == (2, [])
    gone = await post(admin, "/v1/models/unload", {"model": "other"})
    assert gone["drift"] == []
    assert (await ask(admin, model="other")).status_code == 404
    assert (await status(admin))["in_sync"]


async def test_a_model_of_the_manifest_rests_until_it_is_loaded_again(admin: Scene) -> None:
    await post(admin, "/v1/models/load", OTHER)
    engine = pid(admin, "other")
    await post(admin, "/v1/models/unload", {"model": "chat"})
    refused = await ask(admin, model="chat")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_unloaded")
    assert (await ask(admin, model="chat:pirate")).json()["error"]["code"] == "model_unloaded"
    now = await status(admin)
    assert {m["name"]: m["state"] for m in now["models"]} == {"other": "ready", "chat": "unloaded"}
    assert now["drift"] == "models.other loaded, models.chat unloaded by the admin API"
    assert not now["in_sync"]
    await post(admin, "/v1/models/load", {"model": "chat"})
    assert (await text(admin, model="chat")).startswith("base ")
    assert pid(admin, "other") == engine


async def test_adapters_come_and_go_in_place(admin: Scene) -> None:
    engine = pid(admin)
    await post(admin, "/v1/adapters/load", {"model": "chat", "adapter": "loud", "source": "./adapters/shout"})
    key = await text(admin, adapter_name="loud")
    assert not key.startswith("base ")
    await post(admin, "/v1/adapters/unload", {"model": "chat", "adapter": "pirate"})
    assert (await ask(admin, adapter_name="pirate")).status_code == 404
    now = await status(admin)
    assert now["drift"] == "models.chat.adapters.loud loaded, models.chat.adapters.pirate unloaded by the admin API"
    await post(admin, "/v1/adapters/load", {"model": "chat", "adapter": "pirate"})
    await post(admin, "/v1/adapters/unload", {"model": "chat", "adapter": "loud"})
    assert (await status(admin))["drift"] == ""
    assert (await text(admin, adapter_name="pirate")) != key
    assert pid(admin) == engine


async def test_plan_shows_drift_and_apply_reverts_it(admin: Scene) -> None:
    await post(admin, "/v1/models/load", OTHER)
    await post(admin, "/v1/models/unload", {"model": "chat"})
    planned = await post(admin, "/v1/plan")
    assert planned["drift"] == planned["plan"]["drift"] == ["models.other loaded", "models.chat unloaded"]
    reasons = {action["target"]: action["reason"] for action in planned["plan"]["actions"]}
    assert reasons["models.other"] == "loaded by the admin API, and in no manifest"
    applied = await post(admin, "/v1/apply", {"generation": planned["generation"]})
    assert applied["drift"] == []
    assert (await text(admin, model="chat")).startswith("base ")
    assert (await ask(admin, model="other")).json()["error"]["code"] == "model_not_found"
    assert (await post(admin, "/v1/plan"))["plan"]["actions"] == []


async def test_an_edit_reverts_it_and_what_is_no_edit_does_not(admin: Scene) -> None:
    await post(admin, "/v1/models/load", OTHER)
    (admin.folder / "models" / "beside").mkdir()
    admin.manifest.touch()
    assert admin.runner is not None
    await admin.runner._reconciler.reconcile()
    assert (await text(admin, model="other")).startswith("base ")
    assert (await status(admin))["generation"] == 2
    admin.write(ONE + "\nnew: {source: ./models/chat}")
    await admin.event("applied", 3)
    assert (await ask(admin, model="other")).status_code == 404
    assert (await status(admin))["drift"] == ""


async def test_what_cannot_be_had_changes_nothing_and_says_why(admin: Scene) -> None:
    admin.model("broken", refuse="no such architecture")
    refused = await post(admin, "/v1/models/load", {"model": "new", "source": "./models/broken"}, 422)
    assert "no such architecture" in refused["error"]["message"]
    for body, said in (
        ({"model": "new", "source": "./models/nowhere"}, "there is no folder"),
        ({"model": "new", "source": "./models/other", "config": {"adapterz": {}}}, "adapters"),
        ({"model": "new", "source": "./models/other", "config": {"kv_cache": {"max_context": 0}}}, "max_context"),
        ({"model": "new", "source": "./models/other", "config": {"aliases": ["chat"]}}, "chat"),
        ({"model": "new", "source": "${HOME}"}, "${HOME}"),
    ):
        error = (await post(admin, "/v1/models/load", body, 422))["error"]
        assert said in error["message"]
        assert error["type"] == "invalid_request_error"
    for path, body, code in (
        ("/v1/models/load", {"model": "new"}, 404),
        ("/v1/models/load", {"model": "chat", "source": "./models/other"}, 409),
        ("/v1/models/load", {**OTHER, "servers": ["nope"]}, 400),
        ("/v1/models/load", {"model": "new", "revision": "main"}, 400),
        ("/v1/models/unload", {"model": "new"}, 404),
        ("/v1/models/unload", {"model": "chat"} | {"generation": 9}, 409),
        ("/v1/adapters/load", {"model": "chat", "adapter": "new"}, 404),
        ("/v1/adapters/load", {"model": "chat", "adapter": "pirate", "source": "./adapters/shout"}, 409),
        ("/v1/adapters/load", {"model": "new", "adapter": "a", "source": "./adapters/shout"}, 404),
        ("/v1/adapters/load", {"model": "chat", "adapter": "none", "source": "./adapters/shout"}, 422),
        ("/v1/adapters/unload", {"model": "chat", "adapter": "new"}, 404),
        ("/v1/plan", {"target": ["nope"]}, 409),
        ("/v1/plan", {"manifest": "x"}, 400),
    ):
        assert (await post(admin, path, body, code))["error"]["message"]
    now = await status(admin)
    assert (now["generation"], now["drift"], now["manifest_error"], now["in_sync"]) == (1, "", "", True)
    assert {m["name"] for m in now["models"]} == {"chat"}


async def test_what_is_applied_comes_first(admin: Scene) -> None:
    """The API changes what was applied: an edit that is not live, or a rollback, is not undone, or let in, on the
    way."""
    assert admin.runner is not None
    admin.runner._reconciler.followed.watching = False
    admin.write(ONE + "\nnew: {source: ./models/chat}")
    refused = await post(admin, "/v1/models/load", OTHER, 409)
    assert "edited" in refused["error"]["message"]
    await post(admin, "/v1/apply")
    await admin.runner._reconciler.roll_back(1, _cause())
    refused = await post(admin, "/v1/models/load", OTHER, 409)
    assert "rolled back to 1" in refused["error"]["message"]
    await post(admin, "/v1/apply", {"target": ["chat"]})
    refused = await post(admin, "/v1/models/load", OTHER, 409)
    assert "--target chat" in refused["error"]["message"]
    await post(admin, "/v1/apply")
    await post(admin, "/v1/models/load", OTHER)


def _cause() -> Any:
    from runner.control.ledger import Cause

    return Cause("rollback", "me")


async def test_a_server_that_lists_its_models_serves_what_it_is_asked_to(admin: Scene) -> None:
    admin.lm = admin.lm.replace("apis", "models: [chat], apis")
    admin.write(ONE)
    await admin.event("unchanged")
    await post(admin, "/v1/models/load", OTHER)
    assert (await text(admin, model="other")).startswith("base ")


async def test_who_leaves_leaves_the_change_to_itself(admin: Scene) -> None:
    admin.model("slow", load_seconds=0.5)
    leaving = asyncio.create_task(post(admin, "/v1/models/load", {"model": "slow", "source": "./models/slow"}))
    await admin.event("changing")
    leaving.cancel()
    await admin.event("applied", 2)
    assert (await text(admin, model="slow")).startswith("base ")


async def test_changes_wait_for_each_other(admin: Scene) -> None:
    bodies = [{"model": f"m{n}", "source": "./models/other"} for n in range(4)]
    done = await asyncio.gather(*(post(admin, "/v1/models/load", body) for body in bodies))
    assert sorted(one["generation"] for one in done) == [2, 3, 4, 5]
    assert {m["name"] for m in (await status(admin))["models"]} == {"chat", "m0", "m1", "m2", "m3"}


async def test_running_requests_finish_when_their_model_is_unloaded(admin: Scene) -> None:
    admin.model("slow", token_seconds=0.02)
    await post(admin, "/v1/models/load", {"model": "slow", "source": "./models/slow"})
    running = asyncio.create_task(text(admin, model="slow", max_tokens=20))
    await in_flight(admin, "slow")
    await post(admin, "/v1/models/unload", {"model": "slow"})
    assert (await running).count("base") == 20
