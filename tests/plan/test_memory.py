"""Models that cannot fit are refused before anything is started, with the arithmetic."""

from __future__ import annotations

from .conftest import Place
from .folders import GIB, adapter, sparse


def test_models_that_do_not_fit_into_memory(place: Place) -> None:
    sparse(place.folder / "big", 9 * GIB)
    sparse(place.folder / "small", 3 * GIB)
    adapter(place.folder / "lora", weights=2**20)
    text = """\
        name: dev
        memory: {limit: 75%, reserve: 1GiB}
        servers: {lm: {port: 8080}}
        models:
          big: {source: ./big, kv_cache: {prefix_cache: 1GiB}, adapters: {lora: ./lora}}
          small: {source: ./small, kv_cache: {prefix_cache: 0}}
        """
    (found,) = place.wrong(text)
    assert (found.path, found.line, found.column) == ("memory.limit", 2, 17)
    assert found.message == (
        "the models need 13 GiB (big 9 GiB + small 3 GiB + prefix caches 1 GiB), "
        "and may use 12 GiB (75% of 16 GiB) - 1 GiB reserve = 11 GiB"
    )
    assert found.hint == "raise memory.limit, lower kv_cache.prefix_cache, or serve fewer models"
    assert place.resolve(text, machine_memory=32 * GIB).memory_limit_bytes == 23 * GIB


def test_models_that_do_not_fit_into_the_machine(place: Place) -> None:
    sparse(place.folder / "big", 17 * GIB)
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {big: {source: ./big}}\n"
    (found,) = place.wrong(text)
    assert found.path == "models"
    assert found.message.endswith("and may use 16 GiB (all of this machine)")
    assert place.resolve(text, machine_memory=18 * GIB).memory_limit_bytes == 0


def test_a_model_that_does_not_fit_into_its_own_limit(place: Place) -> None:
    sparse(place.folder / "big", 5 * GIB)
    text = "name: dev\nservers: {lm: {port: 8080}}\nmodels:\n  big: {source: ./big, memory_limit: 4GiB}\n"
    (found,) = place.wrong(text)
    assert (found.path, found.line, found.column) == ("models.big.memory_limit", 4, 38)
    assert found.message == "is 4 GiB, but the weights alone take 5 GiB"
