"""What `mlx-run adopt` does to files: every one of them, or none, and nothing but their text."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cli.adopt import _write
from runner.errors import RunnerError
from runner.manifest.adopt import Adopted


def test_links_modes_and_marks_stay(tmp_path: Path) -> None:
    file, link = tmp_path / "real.yaml", tmp_path / "dev.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: dev\r\n")
    file.chmod(0o640)
    link.symlink_to(file)
    _write([Adopted(link, "name: dev\r\n", "name: dev\r\nx: 1\r\n")])
    assert link.is_symlink()
    assert file.read_bytes() == b"\xef\xbb\xbfname: dev\r\nx: 1\r\n"
    assert file.stat().st_mode & 0o777 == 0o640


def test_one_that_was_edited_meanwhile_keeps_all_as_they_are(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("a: 1\n")
    other.write_text("b: 2  # edited\n")
    with pytest.raises(RunnerError, match="edited meanwhile"):
        _write([Adopted(one, "a: 1\n", "a: 3\n"), Adopted(other, "b: 2\n", "b: 4\n")])
    assert (one.read_text(), other.read_text()) == ("a: 1\n", "b: 2  # edited\n")


def test_one_that_is_gone_keeps_the_others_as_they_are(tmp_path: Path) -> None:
    one = tmp_path / "one.yaml"
    one.write_text("a: 1\n")
    with pytest.raises(RunnerError, match="cannot be written") as caught:
        _write([Adopted(one, "a: 1\n", "a: 3\n"), Adopted(tmp_path / "gone.yaml", "", "b: 4\n")])
    assert caught.value.hint == "Nothing was changed."
    assert one.read_text() == "a: 1\n"
