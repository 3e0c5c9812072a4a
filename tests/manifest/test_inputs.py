"""What tells one state of a file or folder from another, and which folders have to be watched for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.manifest.inputs import MAX_BYTES, Inputs


def _inputs(*files: Path, folders: tuple[Path, ...] = ()) -> Inputs:
    return Inputs(dict.fromkeys(files), dict.fromkeys(folders)).now()


def test_watches_the_parent_of_every_hop(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "target").write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "target")
    assert _inputs(tmp_path / "a" / "link").folders_to_watch() == (tmp_path / "a", tmp_path / "b")


def test_watches_what_exists_above_a_missing_file(tmp_path: Path) -> None:
    assert _inputs(tmp_path / "no" / "such" / "file").folders_to_watch() == (tmp_path,)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert _inputs(tmp_path / "a").folders_to_watch() == (tmp_path,)
    assert _inputs(tmp_path / "a").files == {tmp_path / "a": None}


def test_a_dangling_link_is_watched_where_its_target_would_be(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("b/../b/none")
    assert _inputs(tmp_path / "link").folders_to_watch() == (tmp_path, tmp_path / "b")


def test_files_count_by_content_and_folders_by_what_the_file_system_says(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("one")
    folder.mkdir()
    (folder / "weights").write_text("one")
    before = _inputs(file, folders=(folder,))
    os.utime(file, ns=(1, 1))
    assert before.now() == before
    stamp = (folder / "weights").stat()
    (folder / "weights").write_text("two")
    os.utime(folder / "weights", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = before.now()
    assert after.files == before.files
    assert after.folders != before.folders, "the change time cannot be set back"


def test_what_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    paths = (tmp_path / "pipe", tmp_path / "none", tmp_path, tmp_path / "dangling", tmp_path / "none" / "deep")
    assert set(_inputs(*paths).files.values()) == {None}
    for path in paths:
        with pytest.raises(OSError, match=r"."):
            Inputs().read(path)


def test_a_folder_with_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = _inputs(folders=(tmp_path,))
    assert before.folders[tmp_path] is not None
    (tmp_path / "dangling").unlink()
    assert before.now() != before


def test_reading_stops_where_a_file_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10 * MAX_BYTES)
    assert len(Inputs().read(path)) == MAX_BYTES + 1


def test_what_was_read_is_what_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    inputs = Inputs()
    assert inputs.read(path) == b"one"
    assert inputs.now() == inputs
    path.write_text("two")
    assert inputs.now() != inputs
    with pytest.raises(FileNotFoundError):
        inputs.read(tmp_path / "none")
    (tmp_path / "none").touch()
    assert inputs.now().files[tmp_path / "none"] is not None


@pytest.mark.parametrize("name", ["x" * 300, "with\0nul", "x/" * 3000, "locked/inside"])
def test_paths_that_cannot_be_looked_at_are_as_good_as_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "locked").mkdir(mode=0o000)  # root may enter it all the same
    path = tmp_path / name
    inputs = Inputs({path: None}, {path: None}, {f"{path}*": None})
    inputs.look(path)
    assert inputs.folders[path] is None
    assert inputs.now().files == {path: None}
    assert tmp_path in inputs.folders_to_watch()
    (tmp_path / "locked").chmod(0o700)


def test_imports_little() -> None:
    code = "import sys, runner.manifest.inputs; sys.exit(str({'yaml', 'pydantic', 'asyncio'} & set(sys.modules) or ''))"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env={"PYTHONPATH": root})
    assert done.returncode == 0 or not done.stderr.strip(), done.stderr
