"""Every way in which a file changes is seen: by its events, and where those fail, by a look at it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from runner.control import watcher
from runner.control.followed import Followed
from runner.control.watcher import Watcher
from runner.manifest.inputs import Inputs


class Reader:
    """A subject that remembers what it read in each pass."""

    def __init__(self, *paths: Path, folders: tuple[Path, ...] = (), pattern: str = "") -> None:
        self.paths = (*paths, *folders)
        inputs = Inputs(dict.fromkeys(paths), dict.fromkeys(folders), dict.fromkeys([pattern] if pattern else []))
        self.followed = Followed(tuple(paths), inputs.now())
        self.read: list[str] = []
        self.prepared = 0
        self.passed = asyncio.Condition()

    def prepare(self) -> None:
        self.prepared += 1

    async def reconcile(self) -> None:
        self.followed.inputs = self.followed.inputs.now()
        found = [path for pattern in self.followed.inputs.patterns for path in Inputs().match(pattern)]
        text = " ".join(_read(path) for path in (*self.paths, *found))
        async with self.passed:
            self.read.append(text)
            self.passed.notify_all()

    def retry_delay(self) -> float | None:
        return None

    async def until(self, text: str) -> None:
        async with asyncio.timeout(10), self.passed:
            await self.passed.wait_for(lambda: self.read[-1:] == [text])


def _read(path: Path) -> str:
    if path.is_dir():
        return ",".join(sorted(p.read_text() for p in path.iterdir()))
    return path.read_text() if path.exists() else "-"


Watch = Callable[..., Reader]


@pytest.fixture(params=["events", "looks"])
async def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    """Starts a watcher that has events only, or looks only."""
    tasks: list[asyncio.Task[None]] = []
    if request.param == "events":
        monkeypatch.setattr(watcher, "POLL", 60.0)
    else:
        monkeypatch.setattr(watcher, "POLL", 0.05)
        monkeypatch.setattr(Watcher, "_listen", lambda self, folders, stop: stop.wait())

    def start(*files: Path, **more: object) -> Reader:
        reader = Reader(*files, **more)  # type: ignore[arg-type]
        tasks.append(asyncio.create_task(Watcher(reader).run()))
        return reader

    yield start
    for task in tasks:
        assert not task.done() or not task.exception()
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a folder of its own."""
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "m.yaml"
    path.write_text("one")
    return path


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


async def test_written_in_place(file: Path, watch: Watch) -> None:
    reader = watch(file)
    for text in ("two", "three"):
        file.write_text(text)
        await reader.until(text)


async def test_written_in_place_slowly_is_read_once_it_is_whole(file: Path, watch: Watch) -> None:
    reader = watch(file)
    with file.open("w") as out:
        for word in "a whole text":
            out.write(word)
            out.flush()
            await asyncio.sleep(0.03)
    await reader.until("a whole text")
    assert reader.read == ["a whole text"]


async def test_replaced_by_rename_again_and_again(file: Path, watch: Watch) -> None:
    reader = watch(file)
    for text in ("two", "three", "four"):
        _replace(file, text)
        await reader.until(text)
    assert reader.read == ["two", "three", "four"]


async def test_saved_as_vim_does(file: Path, watch: Watch) -> None:
    """The old file becomes a backup, a new one takes its name, the backup goes (`:help backup`)."""
    reader = watch(file)
    for text in ("two", "three"):
        (file.parent / "4913").touch()
        (file.parent / "4913").unlink()
        file.rename(file.with_name("m.yaml~"))
        file.write_text(text)
        file.with_name("m.yaml~").unlink()
        await reader.until(text)
    assert reader.read == ["two", "three"]


async def test_deleted_and_made_again(file: Path, watch: Watch) -> None:
    reader = watch(file)
    file.unlink()
    await reader.until("-")
    file.write_text("two")
    await reader.until("two")


async def test_the_same_size_and_times(file: Path, watch: Watch) -> None:
    reader = watch(file)
    before = file.stat()
    file.write_text("eno")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    await reader.until("eno")


async def test_a_file_that_appears(file: Path, watch: Watch) -> None:
    """A secret, or an env file that need not be there; its folder is not there either."""
    reader = watch(file, file.parent / "secrets" / "deep" / "key")
    (file.parent / "secrets").mkdir()
    await asyncio.sleep(0.05)
    (file.parent / "secrets" / "deep").mkdir()
    (file.parent / "secrets" / "deep" / "key").write_text("sk")
    await reader.until("one sk")


async def test_one_of_several_files_in_several_folders(file: Path, tmp_path: Path, watch: Watch) -> None:
    (tmp_path / "over").mkdir()
    over = tmp_path / "over" / "prod.yaml"
    over.write_text("a")
    reader = watch(file, over)
    over.write_text("b")
    await reader.until("one b")
    _replace(file, "two")
    await reader.until("two b")


async def test_target_of_a_symlink_in_another_folder(file: Path, tmp_path: Path, watch: Watch) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    reader = watch(link)
    _replace(file, "two")
    await reader.until("two")


async def test_every_hop_of_a_chain_of_symlinks(file: Path, tmp_path: Path, watch: Watch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "m").symlink_to("../b/m")
    (tmp_path / "b" / "m").symlink_to(tmp_path / "c" / "m")
    (tmp_path / "c" / "m").symlink_to(file)
    reader = watch(tmp_path / "a" / "m")
    for at, name in enumerate(("c", "b", "a")):
        other = tmp_path / f"other{at}"
        other.write_text(name)
        (tmp_path / "swap").symlink_to(other)
        (tmp_path / "swap").replace(tmp_path / name / "m")
        await reader.until(name)


async def test_a_symlink_to_a_folder_on_the_way(tmp_path: Path, watch: Watch) -> None:
    for release in ("one", "two"):
        (tmp_path / "releases" / release).mkdir(parents=True)
        (tmp_path / "releases" / release / "m.yaml").write_text(release)
    (tmp_path / "current").symlink_to("releases/one")
    reader = watch(tmp_path / "current" / "m.yaml")
    (tmp_path / "next").symlink_to("releases/two")
    (tmp_path / "next").replace(tmp_path / "current")
    await reader.until("two")
    (tmp_path / "releases" / "two" / "m.yaml").write_text("three")
    await reader.until("three")


async def test_configmap_style_swap_of_a_folder_link(tmp_path: Path, watch: Watch) -> None:
    for version in ("v1", "v2", "v3"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "m.yaml").write_text(version)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "m.yaml").symlink_to("..data/m.yaml")
    reader = watch(tmp_path / "m.yaml")
    for version in ("v2", "v3"):
        (tmp_path / "..tmp").symlink_to(version)
        (tmp_path / "..tmp").replace(tmp_path / "..data")
        await reader.until(version)


async def test_a_file_inside_a_folder_and_the_folder_replaced(tmp_path: Path, watch: Watch) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("one")
    reader = watch(folders=(folder,))
    (folder / "weights").write_text("two")
    await reader.until("two")
    folder.rename(tmp_path / "old")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "weights").write_text("three")
    (tmp_path / "fresh").rename(folder)
    await reader.until("three")
    (folder / "weights").write_text("four")
    await reader.until("four")


async def test_a_folder_that_appears_where_a_source_could_be_one(file: Path, watch: Watch) -> None:
    """`org/name` is a folder where there is one."""
    reader = watch(file, folders=(file.parent / "org" / "name",))
    (file.parent / "org" / "name").mkdir(parents=True)
    (file.parent / "org" / "name" / "weights").write_text("w")
    await reader.until("one w")


async def test_folders_of_a_pattern_come_change_and_go(tmp_path: Path, watch: Watch) -> None:
    reader = watch(pattern=str(tmp_path / "teams" / "*" / "adapters" / "*"))
    adapter = tmp_path / "teams" / "a" / "adapters" / "pirate"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("one")
    await reader.until("one")
    (adapter / "weights").write_text("two")
    await reader.until("two")
    (adapter.with_name("sql")).mkdir()
    (adapter.with_name("sql") / "weights").write_text("x")
    await reader.until("two x")
    shutil.rmtree(adapter)
    await reader.until("x")


async def test_the_folder_of_the_file_replaced(
    file: Path, tmp_path: Path, watch: Watch, request: pytest.FixtureRequest
) -> None:
    """No event tells of that: the folder above is not watched. The file in the new folder is."""
    reader = watch(file)
    await asyncio.sleep(0.05)
    file.parent.rename(tmp_path / "old")
    (tmp_path / "config").mkdir()
    file.write_text("two")
    if request.node.callspec.params["watch"] == "events":
        (tmp_path / "old" / "m.yaml").write_text("an event where nobody needs one")
    await reader.until("two")
    file.write_text("three")
    await reader.until("three")


async def test_ten_saves_in_a_second_are_one_pass(file: Path, watch: Watch) -> None:
    reader = watch(file)
    for number in range(10):
        _replace(file, f"save {number}")
        await asyncio.sleep(0.1)
    await reader.until("save 9")
    assert reader.read == ["save 9"]


async def test_a_folder_that_is_being_filled_holds_up_no_edit(file: Path, tmp_path: Path, watch: Watch) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    reader = watch(file, folders=(folder,))

    async def copy() -> None:
        with (folder / "weights").open("w") as out:
            while True:
                out.write("x")
                out.flush()
                await asyncio.sleep(0.02)

    copying = asyncio.create_task(copy())
    await asyncio.sleep(0.3)
    assert reader.read == []
    file.write_text("two")
    async with asyncio.timeout(10), reader.passed:
        await reader.passed.wait_for(lambda: reader.read[-1:] and reader.read[-1].startswith("two"))
    copying.cancel()
    size = (folder / "weights").stat().st_size
    await reader.until(f"two {'x' * size}")


async def test_an_edit_during_a_pass_means_one_more(file: Path, watch: Watch) -> None:
    reader = watch(file)
    plain = reader.reconcile

    async def edited_meanwhile() -> None:
        reader.reconcile = plain  # type: ignore[method-assign]
        await plain()
        file.write_text("three")

    reader.reconcile = edited_meanwhile  # type: ignore[method-assign]
    file.write_text("two")
    await reader.until("three")
    assert reader.read == ["two", "three"]
    assert reader.prepared == 2


async def test_touched_but_not_changed_is_no_edit(file: Path, watch: Watch) -> None:
    reader = watch(file)
    os.utime(file, ns=(1, 1))
    _replace(file, "one")
    await asyncio.sleep(0.3)
    file.write_text("two")
    await reader.until("two")
    assert reader.read == ["two"]


async def test_without_watching_nothing_is_an_edit(file: Path, watch: Watch) -> None:
    reader = watch(file)
    reader.followed.watching = False
    file.write_text("two")
    await asyncio.sleep(0.3)
    assert reader.read == []


async def test_a_try_that_is_due_is_made_though_nothing_changed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "QUIET", 0.01)
    reader = Reader(file)
    delays = [0.05, 0.05, None]
    reader.retry_delay = lambda: delays.pop(0)  # type: ignore[method-assign]
    task = asyncio.create_task(Watcher(reader).run())
    file.write_text("two")
    async with asyncio.timeout(10), reader.passed:
        await reader.passed.wait_for(lambda: len(reader.read) == 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (reader.read, delays) == (["two"] * 3, [])


@pytest.mark.parametrize("error", [OSError("no watches are left"), RuntimeError("the watcher broke")])
async def test_looks_hold_where_events_fail(file: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*folders: object, **options: object) -> object:
        raise error

    monkeypatch.setattr("watchfiles.awatch", fails)
    monkeypatch.setattr(watcher, "POLL", 0.05)
    reader = Reader(file)
    task = asyncio.create_task(Watcher(reader).run())
    for text in ("two", "three"):
        file.write_text(text)
        await reader.until(text)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_fault_ends_neither_the_watch_nor_the_runner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watcher, "POLL", 0.05)

    class Faulty(Inputs):
        def folders_to_watch(self) -> tuple[Path, ...]:
            raise ValueError("no folder of ours")

    file = tmp_path / "file"
    file.write_text("one")
    reader = Reader(file)
    reader.followed.inputs = Faulty(reader.followed.inputs.files)
    watching = asyncio.create_task(Watcher(reader).run())
    with monkeypatch.context() as once:
        once.setattr(Reader, "prepare", lambda self: 1 / 0)
        file.write_text("two")
        async with asyncio.timeout(15):
            while "begins again" not in caplog.text:
                await asyncio.sleep(0.01)
    await reader.until("two")
    assert "not known which folders" in caplog.text
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
