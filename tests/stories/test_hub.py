"""From a name on the hub to an answer: what a user does with a model that is not here yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.fake_hub import FakeHub, fake_hub
from tests.stories.harness import MODELS, Bench, until


@pytest.fixture
def hub(bench: Bench) -> Iterator[FakeHub]:
    """A hub with demo-chat and the adapter pirate, which only members see, for this bench's commands."""
    with fake_hub() as made:
        made.repo("org/demo-chat", MODELS / "demo-chat")
        made.repo("org/pirate", MODELS / "adapters" / "pirate", token="hf_member")
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
            bench.environment.pop(name, None)
        bench.environment |= {"HF_ENDPOINT": made.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(bench.folder / "hf")}
        yield made


def _manifest(bench: Bench, extra: str = "") -> None:
    bench.save(
        f"name: dev\n{extra}servers: {{lm: {{port: {bench.port}}}}}\nmodels:\n"
        "  demo-chat: {source: org/demo-chat, adapters: {pirate: org/pirate}}\n"
    )


def test_apply_downloads_and_answers(bench: Bench, hub: FakeHub) -> None:
    _manifest(bench)
    refused = bench.run("apply", "-d", "dev.yaml")
    assert refused.returncode == 1
    assert "org/pirate (main) cannot be had" in refused.stderr
    assert "set HF_TOKEN, in the environment or an env_file of the manifest" in refused.stderr
    assert hub.fetched("model.safetensors") == [], "all or nothing"
    (bench.folder / "hub.env").write_text("HF_TOKEN=hf_member\n")
    _manifest(bench, "env_file: hub.env\n")
    hub.fault("model.safetensors", cut_after=100_000)
    hub.fault("adapters.safetensors", status=503)
    started = bench.run("apply", "-d", "dev.yaml")
    try:
        assert started.returncode == 0, started.stderr
        assert "org/demo-chat: downloading main into the hub's cache" in started.stdout
        assert f"are here, commit {hub.repos['org/demo-chat'].branches['main'][:12]}" in started.stdout
        assert bench.ask("What is 17 + 25?") == "17 + 25 = 42."
        assert bench.ask("What is 17 + 25?", "pirate").startswith("Arr!")
        assert hub.fetched("model.safetensors")[-1].range == "bytes=100000-"
        _status_says_which_commits(bench, hub)
        happened = bench.run("events").stdout
        assert "downloaded org/pirate at main" in happened
        _models_in_use_stay(bench, hub)
        kept = [path.read_bytes() for path in (bench.folder / "state").rglob("*") if path.is_file()]
        assert not any(b"hf_member" in content for content in kept), "a token is written nowhere"
    finally:
        bench.run("down")


def _status_says_which_commits(bench: Bench, hub: FakeHub) -> None:
    """What answers "which revision runs here?"."""
    chat, pirate = (hub.repos[f"org/{name}"].branches["main"] for name in ("demo-chat", "pirate"))
    assert bench.model()["commits"] == {"model": chat, "adapters.pirate": pirate}
    assert f"org/demo-chat@{chat[:12]}" in bench.run("status").stdout
    assert f"adapters.pirate: commit {pirate}" in bench.run("status", "-v").stdout


def _models_in_use_stay(bench: Bench, hub: FakeHub) -> None:
    """What the runner serves is shown as used, and neither `rm` nor `prune` takes it; what nothing uses goes."""
    hub.repo("org/other", MODELS / "demo-draft")
    assert bench.run("pull", "org/other").returncode == 0
    held = {one["source"]: one for one in json.loads(bench.run("models", "--json").stdout)["models"]}
    assert held["org/demo-chat"]["used_by"] == ["dev: models.demo-chat", "dev.yaml: models.demo-chat"]
    assert held["org/pirate"]["kind"] == "adapter"
    assert held["org/other"]["used_by"] == []
    refused = bench.run("models", "rm", "--yes", "org/demo-chat")
    assert refused.returncode == 1
    assert "is used by" in refused.stderr
    pruned = bench.run("models", "prune", "--yes", "--json")
    assert [name.partition("@")[0] for name in json.loads(pruned.stdout)["removed"]] == ["org/other"]
    assert bench.ask("What is 17 + 25?", "pirate").startswith("Arr!")


def test_an_edit_that_needs_a_download_goes_live_once_the_hub_is_back(bench: Bench, hub: FakeHub) -> None:
    bench.write({})
    hub.fault("/api/models/org/demo-chat", times=2, status=429, headers={"Retry-After": "3600"})
    with bench.serving():
        bench.write({}, model_extra="  second: {source: org/demo-chat}\n")
        until(lambda: "429" in bench.run("status").stdout)
        assert bench.ask("What is 17 + 25?") == "17 + 25 = 42.", "what ran goes on"
        until(lambda: len(bench.status()["models"]) == 2 and bench.status()["in_sync"])
        assert bench.run("wait", "--for", "ready", "second").returncode == 0


def test_a_lock_holds_while_the_branch_moves_and_its_upgrade_goes_live(bench: Bench, hub: FakeHub) -> None:
    bench.save(
        f"name: dev\nservers: {{lm: {{port: {bench.port}}}}}\nmodels: {{demo-chat: {{source: org/demo-chat}}}}\n"
    )
    frozen = bench.run("apply", "-d", "--frozen", "dev.yaml")
    assert frozen.returncode == 1
    assert "there is no dev.lock.yaml" in frozen.stderr
    assert hub.asked == []
    assert bench.run("lock", "dev.yaml").returncode == 0
    repo = hub.repos["org/demo-chat"]
    first = repo.branches["main"]
    started = bench.run("apply", "-d", "--frozen", "dev.yaml")
    try:
        assert started.returncode == 0, started.stderr
        assert f"downloading {first}" in started.stdout
        second = repo.push({**repo.commits[first], "generation_config.json": b'{"temperature": 0.7}'})
        assert bench.run("pull", "org/demo-chat").returncode == 0
        pid = bench.model()["pid"]
        assert "nothing to do" in bench.run("plan", "--frozen", "dev.yaml").stdout
        alone = bench.manifest.read_text()
        bench.save(alone.replace("org/demo-chat}}", "org/demo-chat}, more: {source: org/demo-chat}}"))
        until(lambda: "E812" in bench.run("status").stdout)
        assert "Held to its lock file (--frozen)" in bench.run("status").stdout
        assert bench.model()["pid"] == pid, "frozen holds for edits, too"
        bench.save(alone)
        until(lambda: bench.status()["in_sync"])
        assert bench.model()["pid"] == pid
        upgraded = bench.run("lock", "--upgrade", "dev.yaml")
        assert f"org/demo-chat@{first[:12]} → org/demo-chat@{second[:12]}" in upgraded.stdout
        until(lambda: bench.status()["in_sync"] and bench.model()["pid"] not in (pid, None))
        assert bench.ask("What is 17 + 25?") == "17 + 25 = 42."
        assert bench.run("lock", "--check", "dev.yaml").returncode == 0
    finally:
        bench.run("down")


def test_pull(bench: Bench, hub: FakeHub, tmp_path: Path) -> None:
    (bench.folder / "hub.env").write_text("HF_TOKEN=hf_member\n")
    _manifest(bench, "env_file: hub.env\n")
    pulled = bench.run("pull", "dev.yaml")
    assert pulled.returncode == 0, pulled.stderr
    commit = hub.repos["org/pirate"].branches["main"]
    assert f"org/pirate (main): here, commit {commit}" in pulled.stdout
    fetched = len(hub.asked)
    assert bench.run("pull", "--verify", "dev.yaml").returncode == 0
    assert not [a for a in hub.asked[fetched:] if "resolve" in a.path]
    again = bench.run("pull", "--json", "org/demo-chat")
    *_, done, result = map(json.loads, again.stdout.splitlines())
    assert (done["event"], result["ok"]) == ("downloaded", True)
    none = bench.run("pull", "--json", "org/none")
    assert none.returncode == 1
    assert json.loads(none.stdout.splitlines()[-1])["diagnostics"][0]["code"] == "E803"
    assert "[E803]" in none.stderr
    assert bench.run("pull", "--revision", "v2", "dev.yaml").returncode == 64
    bench.write()
    assert "every source of this manifest is a folder" in bench.run("pull", "dev.yaml").stdout
