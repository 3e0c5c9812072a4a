import stat
from pathlib import Path

import pytest

from runner.control.seal import Sealer, available


def test_equal_secrets_have_equal_seals_in_one_folder_and_over_restarts(tmp_path: Path) -> None:
    seal = Sealer(tmp_path / "seal.key", create=True)
    one = seal("sk-1")
    assert "sk-1" not in one
    assert one == seal("sk-1") == Sealer(tmp_path / "seal.key", create=True)("sk-1")
    assert one != seal("sk-2")
    assert one != Sealer(tmp_path / "another.key", create=True)("sk-1"), "a seal tells nothing without its key"
    assert stat.S_IMODE((tmp_path / "seal.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_without_its_key_a_seal_matches_nothing(tmp_path: Path, damage: bytes) -> None:
    before = Sealer(tmp_path / "seal.key", create=True)("sk-1")
    (tmp_path / "seal.key").write_bytes(damage)
    assert Sealer(tmp_path / "seal.key", create=False)("sk-1") != before
    assert (tmp_path / "seal.key").read_bytes() == damage, "a reader mends nothing"
    assert Sealer(tmp_path / "seal.key", create=True)("sk-1") != before
    assert len((tmp_path / "seal.key").read_bytes()) == 32


def test_a_reader_makes_no_key(tmp_path: Path) -> None:
    Sealer(tmp_path / "seal.key", create=False)("sk-1")
    assert not list(tmp_path.iterdir())


def test_secrets_are_looked_for_where_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "from-env")
    (tmp_path / "key").write_text("from-file\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    sources = ("variable:KEY", "variable:NONE", "", f"file:{tmp_path}/key", f"file:{tmp_path}/none", "what")
    assert available((*sources, f"file:{tmp_path}/binary", f"file:{tmp_path}")) == ["from-env", "from-file"]
