"""Adapters that come and go while rows run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.engine.grammar.service import Grammars
from runner.engine.loader import load
from runner.engine.prefix_cache import PrefixCache
from runner.engine.row import Row
from runner.protocol import AdapterSource, Grammar
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox, hello world. def main")


def test_rows_finish_on_the_adapter_version_they_began_with(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    shapes = linear_shapes(loaded, ATTENTION)
    sources = [
        AdapterSource(f"v{seed}", str(write_mlx(tmp_path / f"v{seed}", draw(shapes, 4 * seed, seed))))
        for seed in (1, 2, 3)
    ]
    alone = Driver(load(model_folder("llama")))
    for source in sources:
        alone.engine.load_adapter(source)
    expected = {key: alone.one(prompt=PROMPT, adapter=key, max_tokens=30).text for key in ("", "v1", "v2", "v3")}
    assert len(set(expected.values())) == 4, "the adapters say the same"

    driver = Driver(loaded, prefix_cache_bytes=1 << 20)
    driver.engine.load_adapter(sources[0])
    driver.engine.load_adapter(sources[1])
    for i, key in enumerate(["v1", "v2", ""]):
        driver.engine.submit(generate(i, prompt=PROMPT, adapter=key, max_tokens=30))
    for _ in range(5):
        driver.engine.step()
    # v1 gives way to v3 while it runs; v2 moves to another slot when v1 is freed.
    driver.engine.load_adapter(sources[2])
    driver.engine.drop_adapter("v1")
    assert driver.engine.adapters == ["v2", "v3"]
    driver.engine.submit(generate(3, prompt=PROMPT, adapter="v3", max_tokens=30))
    driver.engine.submit(generate(4, prompt=PROMPT, adapter="v1", max_tokens=30))
    driver.drain()
    assert [driver.answers[i].text for i in range(4)] == [expected[key] for key in ("v1", "v2", "", "v3")]
    assert driver.answers[4].rejected is not None
    assert driver.answers[4].rejected.status == 404


def test_a_key_that_returns_does_not_meet_old_values(model_folder: ModelFolder, tmp_path: Path) -> None:
    """The same key with other contents cannot happen by digest; even so, nothing of a dropped one is kept."""
    loaded = load(model_folder("llama"))
    driver = Driver(loaded, prefix_cache_bytes=1 << 20)
    shapes = linear_shapes(loaded, ATTENTION)
    driver.engine.load_adapter(AdapterSource("k", str(write_mlx(tmp_path / "one", draw(shapes, 4, 1)))))
    first = driver.one(prompt=PROMPT, adapter="k", max_tokens=20)
    driver.engine.drop_adapter("k")
    driver.engine.load_adapter(AdapterSource("k", str(write_mlx(tmp_path / "two", draw(shapes, 4, 2)))))
    second = driver.one(prompt=PROMPT, adapter="k", max_tokens=20)
    assert second.text != first.text
    assert second.usage is not None
    assert second.usage.cached_tokens == 0


def test_a_dropped_adapters_late_rows_leave_no_entry(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    driver = Driver(loaded, prefix_cache_bytes=1 << 20)
    adapter = write_mlx(tmp_path / "a", draw(linear_shapes(loaded, ATTENTION), 4, 1))
    driver.engine.load_adapter(AdapterSource("a", str(adapter)))
    driver.engine.submit(generate(1, prompt=PROMPT, adapter="a", max_tokens=5))
    driver.engine.step()
    driver.engine.drop_adapter("a")
    driver.drain()
    assert driver.engine.stats().prefix_cache_bytes == 0


@pytest.fixture
def adapted(model_folder: ModelFolder, tmp_path: Path) -> Driver:
    """An engine with the adapter `a`."""
    loaded = load(model_folder("llama"))
    driver = Driver(loaded, prefix_cache_bytes=1 << 20)
    folder = write_mlx(tmp_path / "a", draw(linear_shapes(loaded, ATTENTION), 4, 1))
    driver.engine.load_adapter(AdapterSource("a", str(folder)))
    return driver


def test_an_adapter_is_given_back_once_by_rows_whose_end_goes_wrong(
    adapted: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping what the second row has computed fails, when that of the first is kept already."""
    stored: list[str] = []

    def store(self: PrefixCache, key: str, *_: Any) -> None:
        stored.append(key)
        if len(stored) == 2:
            raise RuntimeError("no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, "_store", store)
        answers = adapted.run([generate(i, prompt=PROMPT, adapter="a", max_tokens=3) for i in range(2)])
    assert stored == ["a", "a"]
    assert [answers[i].finish_reason for i in range(2)] == ["length", "length"]
    assert adapted.one(prompt=PROMPT, adapter="a", max_tokens=3).tokens == 3
    adapted.engine.drop_adapter("a")
    assert adapted.engine._bank.nbytes == 0, "no row holds it"


def test_an_adapter_is_given_back_where_a_grammar_cannot_be_looked_up(
    adapted: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give(self: Grammars, row: Row, grammar: Grammar) -> bool:
        raise RuntimeError("a matcher's bug")

    with monkeypatch.context() as patch:
        patch.setattr(Grammars, "give", give)
        refused = adapted.one(prompt=PROMPT, adapter="a", grammar=Grammar("regex", "a", "x")).rejected
    assert refused is not None
    assert refused.status == 500
    adapted.engine.drop_adapter("a")
    assert adapted.engine._bank.nbytes == 0, "no row holds it"
