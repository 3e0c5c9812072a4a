import asyncio
import json
import shutil
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.control.scene import Scene
from tests.plan.folders import hub_snapshot, safetensors
from tests.plan.test_render import sound

Capture = pytest.CaptureFixture[str]


async def test_exit_codes_against_a_runner(up: Scene, capsys: Capture) -> None:
    asked = ["plan", str(up.manifest), "--detailed-exitcode"]
    assert await asyncio.to_thread(main, asked) == 0
    assert "nothing to do, 2 unchanged (against what runs, generation 1)" in capsys.readouterr().out
    other = up.folder / "other.yaml"
    other.write_text(up.manifest.read_text().replace("gpt-x", "gpt-y"))
    asked[1] = str(other)
    assert await asyncio.to_thread(main, [*asked, "--json"]) == 2
    made = sound(json.loads(capsys.readouterr().out))
    assert [a["target"] for a in made["actions"]] == ["models.chat"]
    assert made["against"] == {"what": "runner", "generation": 1}
    assert await asyncio.to_thread(main, asked[:2]) == 0, "only who asks gets a 2"
    other.write_text("name: dev\nmodels: {chat: {sauce: x}}\n")
    assert await asyncio.to_thread(main, asked) == 1


def test_exit_codes_without_a_runner(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    scene.write("chat: {source: ./models/chat}")
    assert main(["plan", str(scene.manifest)]) == 0
    assert main(["plan", str(scene.manifest), "--detailed-exitcode"]) == 2
    assert main(["plan", str(tmp_path / "none.yaml"), "--detailed-exitcode"]) == 1
    assert not (tmp_path / "state").exists(), "looking leaves nothing behind"


async def test_without_a_runner_it_compares_with_what_was_live_last(up: Scene, capsys: Capture) -> None:
    up.lm = up.lm.replace("}", ", auth: {api_keys: [sk-old]}}")
    up.write("chat: {source: ./models/chat, aliases: [gpt-x]}")
    await up.event("applied", 2)
    assert up.runner is not None
    up.runner._stop.set()
    await up.running  # type: ignore[misc]
    asked = ["plan", str(up.manifest), "--detailed-exitcode", "--diff"]
    assert await asyncio.to_thread(main, asked) == 0
    assert "no runner is up: against what was live last, generation 2" in capsys.readouterr().out
    up.lm = up.lm.replace("sk-old", "sk-new")
    up.write("chat: {source: ./models/chat, aliases: [gpt-y]}")
    assert await asyncio.to_thread(main, asked) == 2
    shown = capsys.readouterr().out
    assert 'aliases: ["gpt-x"] → ["gpt-y"]' in shown
    assert "auth.api_keys: (secret, changed)" in shown
    assert "sk-" not in shown


async def test_the_plan_that_is_shown_is_the_one_that_apply_executes(up: Scene, capsys: Capture) -> None:
    up.model("other", mib=1)
    later = up.manifest.with_name("later.yaml")
    later.write_text(
        up.manifest.read_text().replace("./models/chat, aliases: [gpt-x]", "./models/other")
        + "  talk: {source: ./models/chat, adapters: {pirate: ./adapters/pirate}}\n"
    )
    assert await asyncio.to_thread(main, ["plan", str(later), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert await asyncio.to_thread(main, ["apply", str(later)]) == 0
    planned = [event["plan"] for event in up.events if event["event"] == "planned"][-1]
    assert planned == shown
    done = [(e["action"], e["target"]) for e in up.events if e["event"] == "action_done"]
    actions = [(a["action"], a["target"]) for a in shown["actions"]]
    assert sorted(done[-len(actions) :]) == sorted(actions)
    assert ("rename", "models.talk") in actions


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the manifests here need, set before a runner starts; an empty hub cache."""
    monkeypatch.setenv("KEY", "sk-1234")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


async def test_a_diff_shows_fields_and_no_secret(environment: Path, up: Scene, capsys: Capture) -> None:
    up.lm = up.lm.replace("}", ", auth: {api_keys: ['${KEY}']}}")
    up.manifest = up.folder / "keyed.yaml"
    up.write("chat: {source: ./models/chat, aliases: [gpt-x], kv_cache: {max_context: 4096}, memory_limit: 1GiB}")
    for extra in (["--diff"], ["--json"]):
        assert await asyncio.to_thread(main, ["plan", str(up.manifest), *extra]) == 0
    shown = capsys.readouterr().out
    assert "+ auth.api_keys: (secret, added)" in shown
    assert "+ kv_cache.max_context: 4096" in shown
    assert "+ memory_limit: 1.0 GiB" in shown
    assert "sk-1234" not in shown


def test_the_plan_goes_to_a_file_too(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    scene.write("chat: {source: ./models/chat}")
    out = tmp_path / "plan.json"
    assert main(["plan", str(scene.manifest), "--out", str(out)]) == 0
    assert "2 to do" in capsys.readouterr().out
    assert sound(json.loads(out.read_text()))["against"]["what"] == "nothing"
    assert main(["plan", str(scene.manifest), "-o", str(tmp_path / "no" / "plan.json")]) == 1
    assert "cannot write" in capsys.readouterr().err


HUB = "chat: {source: ./models/chat}\na: {source: org/a}\nb: {source: org/b, adapters: {x: org/x}}"


async def test_what_would_be_downloaded_is_told_and_not_downloaded(
    environment: Path, up: Scene, capsys: Capture
) -> None:
    up.manifest = up.folder / "later.yaml"
    up.write(HUB)
    index = {"metadata": {"total_size": 5 * 2**30}, "weight_map": {"w": "model-1.safetensors", "v": "m-2.safetensors"}}
    half = safetensors({"w": 2**20})
    shard = {"model-1.safetensors": half, "model.safetensors.index.json": json.dumps(index).encode()}
    hub_snapshot(environment, "org/b", {"config.json": b'{"model_type": "llama"}', **shard})
    blobs = environment / "models--org--b" / "blobs"
    (blobs / "half.incomplete").touch()
    assert await asyncio.to_thread(main, ["plan", str(up.manifest), "--json"]) == 0
    downloads = sound(json.loads(capsys.readouterr().out))["downloads"]
    assert downloads == [
        {"repo": "org/a", "revision": "main", "bytes": None, "targets": ["models.a"]},
        {"repo": "org/b", "revision": "main", "bytes": 5 * 2**30 - len(half), "targets": ["models.b"]},
        {"repo": "org/x", "revision": "main", "bytes": None, "targets": ["models.b.adapters.x"]},
    ]
    assert await asyncio.to_thread(main, ["plan", str(up.manifest)]) == 0
    assert "Download: org/a (main), size unknown, for models.a." in capsys.readouterr().out
    assert [event for event in up.events if event["event"] == "downloading"] == []


def test_the_same_without_a_runner(
    environment: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    scene.write(HUB)
    assert main(["plan", str(scene.manifest), "--detailed-exitcode"]) == 2
    shutil.rmtree(scene.folder / "models" / "chat")
    assert main(["plan", str(scene.manifest)]) == 1, "what can be known to be wrong is wrong before any download"
    assert not environment.exists()
