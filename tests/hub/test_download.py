"""Downloads from a hub on loopback by the real client: what can go wrong, and that nothing half-done is ever used."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from runner.hub.cache import snapshot
from runner.hub.download import Progress, Refused, download, lines
from runner.hub.jobs import Failure, Job, Patience, request
from runner.hub.transfer import PARTIAL
from tests.hub import fake_hub as fake
from tests.hub.fake_hub import FakeHub, Repo, fake_hub
from tests.plan.folders import adapter, model, safetensors

QUICK = Patience(tries=3, first=0.01, longest=0.02)
WEIGHTS = safetensors({"w": 3_000_000}, fill=b"\7")
CHAT = Job("org/chat", "main", ("model",))


def chat(hub: FakeHub, tmp_path: Path, name: str = "org/chat", **options: object) -> Repo:
    """A repository of a model whose weights come in several pieces, with files that nothing needs."""
    folder = model(tmp_path / "made" / name)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for other in (
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling_chat.py",
        "1_adapters.safetensors",
    ):
        (folder / other).write_text("not needed")
    return hub.repo(name, folder, **options)


async def get(*jobs: Job, patience: Patience = QUICK, token: str = "") -> list[Progress]:
    told: list[Progress] = []
    await download(jobs or (CHAT,), told.append, patience=patience, token=token)
    return told


async def refused(*jobs: Job, patience: Patience = QUICK, token: str = "") -> list[Failure]:
    with pytest.raises(Refused) as caught:
        await get(*jobs, patience=patience, token=token)
    return list(caught.value.failures)


def nothing_to_see(cache: Path, repo: str = "org/chat") -> bool:
    """Neither a snapshot nor a ref, and no blob under its own name that is not whole."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    shown = [*folder.glob("snapshots/*"), *folder.glob("refs/*")]
    return snapshot(cache, repo, "main") is None and not shown


async def test_what_is_needed_comes_and_nothing_else(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    repo = chat(hub, tmp_path)
    told = await get()
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    assert held.name == repo.branches["main"]
    assert sorted(path.name for path in held.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (held / "model.safetensors").read_bytes() == WEIGHTS
    last = told[-1]
    assert (last.whole, last.commit, last.done) == (True, held.name, last.total)
    assert last.total == sum(path.stat().st_size for path in held.iterdir())
    assert not list(cache.rglob("*.incomplete*"))
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    assert try_to_load_from_cache("org/chat", "config.json", cache_dir=cache) == str(held / "config.json")
    assert hashlib.sha256(WEIGHTS).hexdigest() == (held / "model.safetensors").readlink().name
    # What the hub's own client then needs is there already: it fetches nothing a second time.
    before = len(hub.fetched("model.safetensors"))
    assert snapshot_download("org/chat", cache_dir=cache, allow_patterns=["model*"], endpoint=hub.url) == str(held)
    assert len(hub.fetched("model.safetensors")) == before


async def test_several_repositories_at_once_and_again_without_a_byte(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    hub.repo("org/pirate", adapter(tmp_path / "pirate"))
    jobs = (CHAT, Job("org/pirate", "main", ("adapter",)))
    hold = threading.Event()
    hub.fault("model.safetensors", hold=hold)
    getting = asyncio.create_task(get(*jobs))
    while not hub.fetched("adapters.safetensors"):  # it does not wait for the model before it
        await asyncio.sleep(0.01)
    hold.set()
    assert {p.repo for p in await getting if p.whole} == {"org/chat", "org/pirate"}
    before = len(hub.asked)
    await get(*jobs)
    assert [a.path for a in hub.asked[before:] if "resolve" in a.path] == []


async def test_it_goes_on_where_it_was_cut(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    hub.fault("model.safetensors", cut_after=2_000_000)
    await get()
    first, second = hub.fetched("model.safetensors")
    assert (first.range, second.range) == ("", "bytes=2000000-")
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    assert (held / "model.safetensors").read_bytes() == WEIGHTS


async def test_a_killed_download_leaves_nothing_visible_and_is_gone_on_from(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    chat(hub, tmp_path)
    hub.fault("model.safetensors", cut_after=2_000_000)
    hub.fault("model.safetensors", hold=threading.Event())
    asked = lines("runner.hub.fetch", request([CHAT], "", QUICK))
    partial = cache / "models--org--chat" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}{PARTIAL}"

    async def read() -> None:
        async for _ in asked:
            pass

    reading = asyncio.create_task(read())
    while not (partial.exists() and partial.stat().st_size == 2_000_000 and len(hub.fetched("model.safetensors")) == 2):
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asked.aclose()  # the process was killed
    assert nothing_to_see(cache)
    assert partial.stat().st_size == 2_000_000
    hub.faults.clear()
    before = len(hub.asked)
    await get()
    (again,) = [a for a in hub.asked[before:] if a.path.endswith("model.safetensors")]
    assert again.range == "bytes=2000000-"
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    assert (held / "model.safetensors").read_bytes() == WEIGHTS


PARENT = """
import asyncio
from runner.hub.download import download
from runner.hub.jobs import Job
asyncio.run(download([Job("org/chat", "main", ("model",))]))
"""


def test_it_ends_with_the_runner_that_was_killed(hub: FakeHub, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    hub.fault("model.safetensors", hold=threading.Event())
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=Path(__file__).parents[2])
    while not hub.fetched("model.safetensors"):
        time.sleep(0.01)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert [child for child in children if "runner.hub.fetch" in child.cmdline()]
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left


async def test_a_partial_file_that_is_damaged_is_fetched_anew(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    blobs = cache / "models--org--chat" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}{PARTIAL}").write_bytes(b"x" * 1_000_000)
    told = await get()
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    assert (held / "model.safetensors").read_bytes() == WEIGHTS
    assert [a.range for a in hub.fetched("model.safetensors")] == ["bytes=1000000-", ""]
    assert told[-1].done == told[-1].total


@pytest.mark.parametrize("file", ["model.safetensors", pytest.param("config.json", marks=pytest.mark.nightly)])
async def test_what_is_not_as_listed_is_never_used(hub: FakeHub, cache: Path, tmp_path: Path, file: str) -> None:
    chat(hub, tmp_path)
    hub.fault(file, times=2, corrupt=True)
    (failure,) = await refused()
    assert failure.code == "E806"
    assert f"{file} is not what the hub lists" in failure.message
    assert nothing_to_see(cache)
    hub.faults.clear()
    await get()
    assert snapshot(cache, "org/chat", "main") is not None


@pytest.mark.nightly
async def test_blobs_that_are_there_are_read_again_where_that_is_asked_for(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    chat(hub, tmp_path)
    await get()
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    weights = held / "model.safetensors"
    weights.resolve().write_bytes(b"\1" + WEIGHTS[1:])
    await get()
    assert weights.read_bytes() != WEIGHTS, "sizes alone do not tell"
    await get(CHAT._replace(verify=True))
    assert weights.read_bytes() == WEIGHTS


async def test_the_hub_is_given_time(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    hub.fault("/api/models/org/chat", status=503)
    hub.fault("/api/models/org/chat", status=429, headers={"Retry-After": "1"})
    hub.fault("model.safetensors", status=500)
    hub.fault("model.safetensors", status=429, headers={"Retry-After": "0"})
    hub.fault("config.json", status=429, headers={"RateLimit": '"resolvers";r=0;t=0'})
    began = time.monotonic()
    await get()
    assert snapshot(cache, "org/chat", "main") is not None
    assert time.monotonic() - began >= 1.0, "as long as the hub asked for"


@pytest.mark.parametrize(
    ("status", "words"),
    [(429, "too many requests (HTTP 429), 3 times"), (502, "the hub answers with HTTP 502, 3 times")],
)
async def test_patience_ends(hub: FakeHub, cache: Path, tmp_path: Path, status: int, words: str) -> None:
    chat(hub, tmp_path)
    hub.fault("model.safetensors", times=99, status=status)
    (failure,) = await refused()
    assert (failure.code, failure.passing) == ("E804", True)
    assert words in failure.message
    assert "what is there already is kept" in failure.hint
    assert nothing_to_see(cache)
    assert len(hub.fetched("model.safetensors")) == 3


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}])
async def test_nobody_waits_for_an_hour(hub: FakeHub, tmp_path: Path, headers: dict[str, str]) -> None:
    chat(hub, tmp_path)
    hub.fault("/api/models/org/chat", status=429, headers=headers)
    (failure,) = await refused()
    assert failure.code == "E804"
    assert len(hub.asked) == 1


async def test_gated_private_unknown(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path, "org/gated", gated=True, token="hf_let_in")
    chat(hub, tmp_path, "org/private", token="hf_let_in")
    chat(hub, tmp_path)
    jobs = [Job(f"org/{name}", "main") for name in ("gated", "private", "none")]
    found = {f.repo: f for f in await refused(*jobs, Job("org/chat", "v9"), Job("org/chat", "main"))}
    assert {repo: f.code for repo, f in found.items()} == {
        "org/gated": "E802", "org/private": "E803", "org/none": "E803", "org/chat": "E803",
    }  # fmt: skip
    assert "accept its terms at" in found["org/gated"].hint
    assert "HF_TOKEN" in found["org/gated"].hint
    assert "HF_TOKEN" in found["org/private"].hint
    assert "has no revision 'v9'" in found["org/chat"].message
    assert not any(f.passing for f in found.values())
    assert nothing_to_see(cache), "what could be had is not fetched, where not all can"
    await get(*jobs[:2], token="hf_let_in")
    assert snapshot(cache, "org/gated", "main") is not None
    assert snapshot(cache, "org/private", "main") is not None
    assert all("hf_let_in" not in str(path.read_bytes()) for path in cache.rglob("*") if path.is_file())


@pytest.mark.nightly
async def test_a_token_of_the_environment(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(hub, tmp_path, token="hf_mine")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    (failure,) = await refused()
    assert failure.code == "E803"
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    await get()
    assert snapshot(cache, "org/chat", "main") is not None


async def test_a_token_goes_to_the_hub_and_not_to_where_it_sends_us(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path, token="hf_mine")
    hub.fault("model.safetensors", redirect="")
    with fake_hub() as storage:
        chat(storage, tmp_path / "storage")
        hub.faults[0].redirect = storage.url
        await get(token="hf_mine")
        assert snapshot(cache, "org/chat", "main") is not None
        assert {asked.token for asked in hub.asked} == {"hf_mine"}
        assert [asked.token for asked in storage.asked] == [""]


@pytest.mark.parametrize(
    "blob", ["../../../../stolen", *(pytest.param(b, marks=pytest.mark.nightly) for b in ("", "ABC"))]
)
async def test_a_hub_that_lists_no_digests(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blob: str
) -> None:
    chat(hub, tmp_path)
    real = fake.listed
    monkeypatch.setattr(fake, "listed", lambda *about: {**real(*about), "blobId": blob})
    (failure,) = await refused()
    assert failure.code == "E806"
    assert nothing_to_see(cache)
    assert not list(tmp_path.rglob("stolen"))


async def test_offline_nothing_is_asked(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat(hub, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (failure,) = await refused()
    assert (failure.code, failure.passing) == ("E801", False)
    assert hub.asked == []


async def test_a_hub_that_is_not_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (failure,) = await refused()
    assert failure.code == "E804"
    assert "the hub at http://127.0.0.1:9 cannot be reached (ConnectError" in failure.message


async def test_a_disk_that_is_too_small_is_told_before_a_byte_comes(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    repo = chat(hub, tmp_path)
    repo.claimed["model.safetensors"] = 2**60
    (failure,) = await refused()
    assert failure.code == "E805"
    assert "1.049e+06 TiB are to come" in failure.message
    assert "room for" in failure.message
    assert hub.fetched("config.json") == []
    assert nothing_to_see(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_disk_that_fills_meanwhile(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        monkeypatch.setenv("HF_HOME", str(disk))
        chat(hub, tmp_path)
        hold = threading.Event()
        hub.fault("model.safetensors", hold=hold)
        getting = asyncio.create_task(refused())
        while not hub.fetched("model.safetensors"):
            await asyncio.sleep(0.01)
        (disk / "other").write_bytes(b"\0" * 2_500_000)
        hold.set()
        (failure,) = await getting
        assert failure.code == "E805"
        assert f"the disk of {disk / 'hub'} is full" in failure.message
        assert nothing_to_see(disk / "hub")
        (disk / "other").unlink()
        await get()
        assert snapshot(disk / "hub", "org/chat", "main") is not None
        assert hub.fetched("model.safetensors")[-1].range, "what was there was gone on from"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def test_repositories_that_hold_no_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.repo("org/torch").push({"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.repo("org/pirate", adapter(tmp_path / "pirate"))
    jobs = [Job("org/torch", "main"), Job("org/pirate", "main", ("model",))]
    torch, pirate = await refused(*jobs)
    assert (torch.code, pirate.code) == ("E807", "E807")
    assert "holds no model*.safetensors, but pytorch_model.bin" in torch.message
    assert "it holds an adapter" in pirate.message


async def test_a_branch_that_moves_while_it_is_fetched(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    repo = chat(hub, tmp_path)
    first = repo.branches["main"]
    hold = threading.Event()
    hub.fault("model.safetensors", hold=hold)
    getting = asyncio.create_task(get())
    while not hub.fetched("model.safetensors"):
        await asyncio.sleep(0.01)
    second = repo.push({**repo.commits[first], "model.safetensors": safetensors({"w": 10})})
    hold.set()
    await getting
    held = snapshot(cache, "org/chat", "main")
    assert held is not None
    assert held.name == first
    assert (held / "model.safetensors").read_bytes() == WEIGHTS, "all of one commit"
    await get()
    moved = snapshot(cache, "org/chat", "main")
    assert moved is not None
    assert moved.name == second


@pytest.mark.nightly
async def test_two_processes_fetch_a_file_once(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    chat(hub, tmp_path)
    await asyncio.gather(get(), get())
    assert len(hub.fetched("model.safetensors")) == 1
    assert snapshot(cache, "org/chat", "main") is not None
