import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from runner.control.watcher import Watcher, signature, watched_folders


class Reader:
    """A subject that remembers what it read in each pass."""

    def __init__(self, *files: Path) -> None:
        self.files = files
        self.read: list[str] = []
        self.prepared = 0
        self.passed = asyncio.Condition()

    def prepare(self) -> None:
        self.prepared += 1

    async def reconcile(self) -> None:
        text = " ".join(_read(path) for path in self.files)
        async with self.passed:
            self.read.append(text)
            self.passed.notify_all()

    def retry_delay(self) -> float | None:
        return None

    async def until(self, text: str) -> None:
        async with asyncio.timeout(5), self.passed:
            await self.passed.wait_for(lambda: self.read[-1:] == [text])


def _read(path: Path) -> str:
    if path.is_dir():
        return ",".join(sorted(p.read_text() for p in path.iterdir()))
    return path.read_text() if path.exists() else "-"


@pytest.fixture
async def watch() -> AsyncIterator[Callable[..., Reader]]:
    tasks: list[asyncio.Task[None]] = []

    def start(*files: Path) -> Reader:
        reader = Reader(*files)
        tasks.append(asyncio.create_task(Watcher(reader).run(signature(files))))
        return reader

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_written_in_place(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("one")
    reader = watch(file)
    for text in ("two", "three"):
        file.write_text(text)
        await reader.until(text)


async def test_replaced_by_rename_again_and_again(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("one")
    reader = watch(file)
    for text in ("two", "three", "four"):
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)
        await reader.until(text)


async def test_deleted_and_made_again(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("one")
    reader = watch(file)
    file.unlink()
    await reader.until("-")
    file.write_text("two")
    await reader.until("two")


async def test_target_of_a_symlink_in_another_folder(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "target"
    target.write_text("one")
    link = tmp_path / "m.yaml"
    link.symlink_to(target)
    reader = watch(link)
    target.write_text("two")
    await reader.until("two")


async def test_configmap_style_swap_of_a_folder_link(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "m.yaml").write_text(version)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "m.yaml").symlink_to("..data/m.yaml")
    reader = watch(tmp_path / "m.yaml")
    (tmp_path / "..tmp").symlink_to("v2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    await reader.until("v2")


async def test_a_file_inside_a_folder_and_the_folder_replaced(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("one")
    reader = watch(folder)
    (folder / "weights").write_text("two")
    await reader.until("two")
    folder.rename(tmp_path / "old")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "weights").write_text("three")
    (tmp_path / "fresh").rename(folder)
    await reader.until("three")
    (folder / "weights").write_text("four")
    await reader.until("four")


async def test_many_saves_settle_on_the_last(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("start")
    reader = watch(file)
    for number in range(10):
        file.write_text(f"save {number}")
    await reader.until("save 9")
    assert len(reader.read) < 10


async def test_an_edit_during_a_pass_means_one_more(tmp_path: Path, watch: Callable[..., Reader]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("one")
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


async def test_touched_but_not_changed_is_seen_as_a_state_only_once(
    tmp_path: Path, watch: Callable[..., Reader]
) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("one")
    reader = watch(file)
    os.utime(file, ns=(1, 1))
    await reader.until("one")
    file.write_text("two")
    await reader.until("two")
    assert reader.read == ["one", "two"]


def test_watches_the_parent_of_every_hop(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "target").write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "target")
    assert watched_folders([tmp_path / "a" / "link"]) == (tmp_path / "a", tmp_path / "b")


def test_watches_what_exists_above_a_missing_file(tmp_path: Path) -> None:
    assert watched_folders([tmp_path / "no" / "such" / "file"]) == (tmp_path,)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert watched_folders([tmp_path / "a"]) == (tmp_path,)
    assert signature([tmp_path / "a"]) == ((str(tmp_path / "a"), None),)
