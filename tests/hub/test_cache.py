"""The hub's cache is found and read as huggingface_hub lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.hub.cache import hub_cache, is_offline, snapshot
from tests.plan.folders import hub_snapshot, write


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "/b"}, "/b/hub"),
    ],
)
def test_where_it_is(env: dict[str, str], folder: str) -> None:
    assert hub_cache(env) == Path(folder)


def test_where_it_is_without_a_word_from_the_environment() -> None:
    assert hub_cache({}) == Path.home() / ".cache" / "huggingface" / "hub"


def test_agrees_with_huggingface_hub(tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = "0123456789abcdef" * 2 + "01234567"
    held = hub_snapshot(tmp_path, "org/name.v1", {"config.json": b"{}"}, commit=commit)
    for revision in ("main", commit):
        theirs = snapshot_download("org/name.v1", revision=revision, cache_dir=tmp_path, local_files_only=True)
        assert snapshot(tmp_path, "org/name.v1", revision) == Path(theirs) == held


def test_branches_with_a_slash(tmp_path: Path) -> None:
    held = hub_snapshot(tmp_path, "org/name", {}, ref="refs/pr/1")
    assert snapshot(tmp_path, "org/name", "refs/pr/1") == held


def test_what_is_not_there(tmp_path: Path) -> None:
    hub_snapshot(tmp_path, "org/name", {})
    assert snapshot(tmp_path, "org/other", "main") is None
    assert snapshot(tmp_path, "org/name", "v2") is None
    assert snapshot(tmp_path, "org/name", "d" * 40) is None
    write(tmp_path / "models--org--name" / "refs" / "odd", "../../../etc")
    assert snapshot(tmp_path, "org/name", "odd") is None


def test_whether_the_hub_may_be_asked() -> None:
    assert [is_offline({"HF_HUB_OFFLINE": word}) for word in ("1", "true", "YES", "0", "")] == [True] * 3 + [False] * 2
    assert is_offline({"TRANSFORMERS_OFFLINE": "1"})
    assert not is_offline({})
