"""Which beginning is found, what it costs, and that hits compute the same."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from runner.engine.loader import LoadedModel, load
from runner.engine.prefix_cache import PrefixCache
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, active_memory
from tests.engine.tiny import encode

KV_BYTES = 2 * 2 * 4 * 4  # keys and values of 2 heads of 4 float32, a token


def kv(tokens: list[int]) -> list[Any]:
    """One layer whose keys and values are the tokens themselves."""
    cache = KVCache()
    values = mx.broadcast_to(mx.array(tokens, dtype=mx.float32)[None, None, :, None], (1, 2, len(tokens), 4))
    cache.state = (values, values, len(tokens))
    return [cache]


def recurrent(tokens: list[int]) -> list[Any]:
    """A state that cannot be taken back."""
    cache = ArraysCache(1)
    cache[0] = mx.full((1, 4), tokens[-1])
    return [cache]


def held(caches: list[Any]) -> list[int]:
    """The tokens that `kv` has put in."""
    keys, _ = caches[0].keys_and_values()
    return [int(value) for value in keys[0, 0, :, 0].tolist()]


def test_finds_the_longest_common_beginning_and_leaves_a_token_to_compute() -> None:
    cache = PrefixCache(1 << 20)
    cache.store("", [1, 2, 3, 4, 5, 6], kv([1, 2, 3, 4, 5, 6]))
    cache.store("", [1, 2, 9, 9], kv([1, 2, 9, 9]))

    for prompt, length in [
        ([1, 2, 3, 4, 7, 7], 4),
        ([1, 2, 3, 4, 5, 6], 5),
        ([1, 2, 3], 2),
        ([1, 2, 9, 9, 9], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], 6),
    ]:
        hit = cache.fetch("", prompt)
        assert hit is not None, prompt
        assert (held(hit[0]), hit[1]) == (prompt[:length], length)
    for prompt in ([2, 1], [1], []):
        assert cache.fetch("", prompt) is None


def test_what_cannot_be_trimmed_is_used_whole_or_not_at_all() -> None:
    cache = PrefixCache(1 << 20)
    cache.store("", [1, 2, 3], recurrent([1, 2, 3]))
    cache.store("", [1, 2, 3, 4, 5], recurrent([1, 2, 3, 4, 5]))

    assert cache.fetch("", [1, 2, 3, 4, 9]) is not None
    assert cache.fetch("", [1, 2, 3, 4, 9])[1] == 3  # type: ignore[index]
    assert cache.fetch("", [1, 2, 3, 4, 5, 6])[1] == 5  # type: ignore[index]
    assert cache.fetch("", [1, 2, 3]) is None, "its last token is left to compute"


def test_room_for_tokens_to_come_is_not_kept() -> None:
    cache = PrefixCache(1 << 20)
    (roomy,) = kv([1])
    roomy.update_and_fetch(mx.ones((1, 2, 1, 4)), mx.ones((1, 2, 1, 4)))
    assert roomy.keys.shape[2] > 2
    cache.store("", [1, 1], [roomy])
    assert cache.nbytes == 2 * (KV_BYTES + 4)
    hit = cache.fetch("", [1, 1, 5])
    assert hit is not None
    assert held(hit[0]) == [1, 1]


def test_adapters_do_not_share_and_are_forgotten_apart() -> None:
    cache = PrefixCache(1 << 20)
    cache.store("a", [1, 2, 3], kv([1, 2, 3]))
    cache.store("", [1, 2, 3], kv([1, 2, 3]))
    assert cache.fetch("b", [1, 2, 3]) is None

    cache.evict("a")

    assert cache.fetch("a", [1, 2, 3]) is None
    assert cache.fetch("", [1, 2, 3]) is not None
    cache.evict("")
    assert cache.nbytes == 0


def test_writing_to_a_hit_leaves_the_entry_alone() -> None:
    cache = PrefixCache(1 << 20)
    cache.store("", [1, 2, 3, 4], kv([1, 2, 3, 4]))
    hit = cache.fetch("", [1, 2, 9, 9])
    assert hit is not None
    new = mx.full((1, 2, 2, 4), 7.0)
    hit[0][0].update_and_fetch(new, new)
    assert held(hit[0]) == [1, 2, 7, 7]

    again = cache.fetch("", [1, 2, 3, 4, 5])
    assert again is not None
    assert held(again[0]) == [1, 2, 3, 4]


def test_stays_within_its_bytes_and_forgets_the_least_recently_used() -> None:
    cache = PrefixCache(3 * 10 * (KV_BYTES + 4))
    prompts = [[base, *range(9)] for base in (100, 200, 300)]
    for prompt in prompts:
        cache.store("", prompt, kv(prompt))
    assert cache.nbytes == 3 * 10 * (KV_BYTES + 4)
    assert cache.fetch("", prompts[0]) is not None

    cache.store("", [400, *range(9)], kv([400, *range(9)]))

    assert cache.fetch("", prompts[0]) is not None
    assert cache.fetch("", prompts[1]) is None
    assert cache.nbytes <= 3 * 10 * (KV_BYTES + 4)
    cache.resize(0)
    assert cache.nbytes == 0
    assert not cache.enabled
    cache.store("", prompts[0], kv(prompts[0]))
    assert cache.fetch("", prompts[0]) is None


def test_an_entry_over_the_limit_is_not_kept_and_evicts_nothing() -> None:
    cache = PrefixCache(12 * (KV_BYTES + 4))
    cache.store("", [1, 2, 3], kv([1, 2, 3]))
    cache.store("", list(range(50)), kv(list(range(50))))
    assert cache.fetch("", [1, 2, 3]) is not None


def test_a_longer_entry_replaces_those_it_begins_with() -> None:
    cache = PrefixCache(1 << 20)
    for size in range(1, 40):
        cache.store("", list(range(size)), kv(list(range(size))))
    assert cache.nbytes == 39 * (KV_BYTES + 4)
    assert cache.fetch("", [0, 1, 2, 99]) is not None


@pytest.fixture(scope="module")
def models(model_folder: ModelFolder) -> dict[str, LoadedModel]:
    return {kind: load(model_folder(kind)) for kind in ("llama", "gemma3_text", "lfm2")}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "lfm2"])
def test_a_second_turn_hits_and_says_the_same(models: dict[str, LoadedModel], kind: str) -> None:
    prompt = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today?")
    driver = Driver(models[kind], prefix_cache_bytes=1 << 24, prefill_step_size=16)
    cold = Driver(models[kind], prefill_step_size=16)
    first = driver.one(prompt=prompt, max_tokens=8)
    assert first.usage is not None
    assert first.usage.cached_tokens == 0
    for following in (prompt + encode(" And then?"), prompt):
        warm = driver.one(prompt=following, max_tokens=8)
        assert warm.usage is not None
        assert warm.text == cold.one(prompt=following, max_tokens=8).text
        if kind == "llama" or following != prompt:
            assert warm.usage.cached_tokens >= len(prompt) - 1
    assert driver.engine.stats().cached_tokens_total > 0


def test_memory_is_flat_under_churn(models: dict[str, LoadedModel]) -> None:
    limit = 400_000
    driver = Driver(models["llama"], prefix_cache_bytes=limit)
    text = encode("the quick brown fox jumps over the lazy dog")
    after = []
    for round_ in range(40):
        prompt = [round_ + 6, *text, round_ + 7]
        driver.one(prompt=prompt, max_tokens=12)
        if round_ >= 25 and round_ % 3 == 0:
            after.append(active_memory())
        assert driver.engine.stats().prefix_cache_bytes <= limit
    assert driver.engine.stats().prefix_cache_bytes > limit / 2, "the limit was never reached"
    assert max(after) - min(after) < limit / 4
