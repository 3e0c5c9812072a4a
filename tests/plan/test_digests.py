"""Digests change when what they stand for does, cost nothing when it does not, and refuse what is not whole."""

from __future__ import annotations

import json
import operator
import os
import pickle
from functools import partial
from pathlib import Path

import pytest

from runner.plan.digests import (
    BadFolder,
    DigestCache,
    FileVersion,
    adapter_digest,
    file_version,
    model_digest,
)

from .folders import LONG_AGO, adapter, hub_snapshot, later, model, safetensors, write


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened from now on."""
    opened: list[str] = []
    real = Path.open

    def recording(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(self.name)
        return real(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", recording)
    return opened


def test_an_unchanged_folder_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DigestCache(now=later)
    folders = model(tmp_path / "m"), adapter(tmp_path / "a")
    before = model_digest(folders[0], cache), adapter_digest(folders[1], cache)
    opened = _reads(monkeypatch)
    assert (model_digest(folders[0], cache), adapter_digest(folders[1], cache)) == before
    assert opened == []


def test_weights_of_a_model_are_never_read_but_for_their_header(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    text = json.dumps({"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 40))
    assert model_digest(folder, DigestCache()).weights_bytes == 1 << 40


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"])
def test_small_files_count_by_content(name: str, tmp_path: Path) -> None:
    cache = DigestCache()
    folder = model(tmp_path / "m")
    write(folder / name, '{"a": 1}')
    before = model_digest(folder, cache)
    write(folder / name, '{"a": 2}')
    assert model_digest(folder, cache) != before
    write(folder / name, '{"a": 1}')
    assert model_digest(folder, cache) == before


def test_other_files_do_not_count(tmp_path: Path) -> None:
    cache = DigestCache()
    folder = model(tmp_path / "m")
    before = model_digest(folder, cache)
    write(folder / "README.md", "hello")
    write(folder / ".cache.json", "{}")
    write(folder / "sub" / "config.json", "{}")
    write(folder / "consolidated.safetensors", "not even one")
    assert model_digest(folder, cache) == before


@pytest.mark.parametrize("change", ["size", "time", "replaced"])
def test_weights_count_by_what_the_file_system_says(change: str, tmp_path: Path) -> None:
    cache = DigestCache()
    folder = model(tmp_path / "m")
    before = model_digest(folder, cache).digest
    weights = folder / "model.safetensors"
    if change == "size":
        write(weights, safetensors({"w": 1001}))
    elif change == "time":
        os.utime(weights, ns=(LONG_AGO, LONG_AGO + 1))
    else:
        write(folder / "new", weights.read_bytes()).replace(weights)
    assert model_digest(folder, cache).digest != before


def test_an_adapter_counts_by_content_alone(tmp_path: Path) -> None:
    one, same = adapter(tmp_path / "one"), adapter(tmp_path / "same")
    os.utime(same / "adapters.safetensors", ns=(LONG_AGO, LONG_AGO + 5))
    write(same / "0000100_adapters.safetensors", "a checkpoint")
    other = adapter(tmp_path / "other", fill=b"\2")
    cache = DigestCache()
    assert adapter_digest(one, cache) == adapter_digest(same, cache)
    assert adapter_digest(one, cache) != adapter_digest(other, cache)
    write(same / "adapter_config.json", '{"fine_tune_type": "dora"}')
    assert adapter_digest(one, cache) != adapter_digest(same, cache)


def test_a_file_that_was_just_written_is_not_trusted_to_look_different_next_time(tmp_path: Path) -> None:
    """Two writes within one tick of the clock leave the same version, and different contents."""
    path = write(tmp_path / "x", "one")
    version = file_version(path)
    assert version is not None
    for age, second in ((50_000_000, "two"), (3_000_000_000, "one")):
        cache = DigestCache(now=partial(operator.add, version.ctime_ns, age))
        read = partial(next, iter(["one", "two"]))
        assert [cache.remember("content", version, lambda _, read=read: read()) for _ in range(2)] == ["one", second]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "one")
    version = file_version(path)
    assert version is not None

    def read(path: Path) -> str:
        write(path, "longer")
        return "one"

    cache = DigestCache()
    with pytest.raises(BadFolder, match="is being written"):
        cache.remember("content", version, read)


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(tmp_path: Path) -> None:
    cache = DigestCache(max_entries=2, now=later)
    versions = [file_version(write(tmp_path / name, name)) for name in "abc"]
    read: list[str] = []

    def remember(version: FileVersion | None) -> None:
        assert version is not None
        cache.remember("content", version, lambda path: read.append(path.name))

    for index in (0, 1, 0, 2, 0, 1):
        remember(versions[index])
    assert read == ["a", "b", "c", "b"]


def test_a_cache_can_be_handed_to_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DigestCache(now=later)
    before = model_digest(model(tmp_path / "m"), cache)
    copy = pickle.loads(pickle.dumps(cache))
    opened = _reads(monkeypatch)
    assert model_digest(tmp_path / "m", copy) == before
    assert opened == []


def test_sizes_come_from_headers(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", weights=700)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write(folder / "model-00002-of-00002.safetensors", safetensors({"a": 5, "b": 0, "c": 20}))
    assert model_digest(folder, DigestCache()).weights_bytes == 725


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    write(tmp_path / "adapter_config.json", '{"peft_type": "LORA"}')
    write(tmp_path / "adapters.safetensors", safetensors({"a": 3}))
    with pytest.raises(BadFolder, match=r"holds no adapter_model\.safetensors"):
        adapter_digest(tmp_path, DigestCache())
    write(tmp_path / "adapter_model.safetensors", safetensors({"a": 50}))
    assert adapter_digest(tmp_path, DigestCache()).weights_bytes == 50


def test_every_prefix_of_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", weights=40)
    whole = (folder / "adapters.safetensors").read_bytes()
    for length in range(len(whole)):
        write(folder / "adapters.safetensors", whole[:length])
        with pytest.raises(BadFolder):
            adapter_digest(folder, DigestCache())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(BadFolder, match=r"holds no (config\.json|model\*\.safetensors)"):
        model_digest(folder, DigestCache())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_an_adapter_folder_that_lacks_a_file(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(BadFolder, match=f"holds no {name}"):
        adapter_digest(folder, DigestCache())


def test_a_configuration_that_is_half_written(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    for text in ("", '{"fine_tune', "[]", "\xff"):
        write(folder / "adapter_config.json", text.encode("latin-1"))
        with pytest.raises(BadFolder, match="is not a JSON object"):
            adapter_digest(folder, DigestCache())


def test_shards_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    write(folder / "model.safetensors.index.json", json.dumps(index))
    with pytest.raises(BadFolder, match=r"lacks 2 of the files in its index, such as model-2\.safetensors"):
        model_digest(folder, DigestCache())


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BadFolder, match="there is no folder"):
        model_digest(tmp_path / "none", DigestCache())
    with pytest.raises(BadFolder, match="is a file, not a folder"):
        model_digest(write(tmp_path / "file", ""), DigestCache())


def test_a_snapshot_of_the_hub_is_known_by_its_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": b"{}", "model.safetensors": safetensors({"w": 9})}
    snapshot = hub_snapshot(tmp_path / "hub", "org/name", files)
    before = model_digest(snapshot, DigestCache())
    for blob in (tmp_path / "hub" / "models--org--name" / "blobs").iterdir():
        os.utime(blob, ns=(LONG_AGO, LONG_AGO + 7))
    opened = _reads(monkeypatch)
    assert model_digest(snapshot, DigestCache()) == before
    assert opened == ["model.safetensors"]
