"""Models that cannot fit are refused before anything is started, with the arithmetic; what has to wait is a warning."""

from __future__ import annotations

from runner.errors import Diagnostic
from runner.machine import Machine
from runner.manifest.load import load_manifest
from runner.plan.resolve import look
from runner.plan.spec import Desired

from .conftest import Place
from .folders import GIB, adapter, sparse

MIB = 2**20
GEOMETRY = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
"""Of which a token takes 16 layers · 2 · 4 heads · 128 · 2 bytes = 32 KiB, and a row of 8,192 tokens 256 MiB."""

SERVERS = "name: dev\nservers: {lm: {port: 8080}}\n"


def _warnings(desired: Desired) -> list[Diagnostic]:
    return [found for found in desired.warnings if found.code != "W608"]


def test_the_terms(place: Place) -> None:
    sparse(place.folder / "big", 2 * GIB, **GEOMETRY)
    memory = place.resolve(SERVERS + "models: {big: {source: ./big}}\n").models[0].memory
    assert (memory.weights, memory.adapters, memory.draft, memory.held) == (2 * GIB, 0, 0, 2 * GIB)
    assert (memory.kv_per_token, memory.kv_row, memory.kv_max) == (32 * 1024, 256 * MIB, 38 * 256 * MIB)
    # A batch of 32 rows that came one by one has room for 38.
    assert (memory.rows, memory.context, memory.prefix_cache) == (32, 8192, 256 * MIB)
    assert memory.most == memory.held + memory.kv_max + memory.prefix_cache + memory.prefill
    assert memory.least == memory.held + 512 * memory.kv_per_token + memory.prefill
    assert memory.exact


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
        "the models need 12 GiB (big 9 GiB + small 3 GiB) for their weights and one request each, "
        "and may use 12 GiB (75% of 16 GiB) - 1 GiB reserve = 11 GiB"
    )
    assert found.hint == "raise memory.limit, quantise, or serve fewer models"
    assert place.resolve(text, machine_memory=32 * GIB).memory_limit_bytes == 23 * GIB


def test_models_that_leave_no_room_for_their_processes(place: Place) -> None:
    for name in ("big", "small", "rare"):
        sparse(place.folder / name, GIB)
    text = (
        SERVERS + "memory: {limit: LIMIT, reserve: 1GiB}\nmodels:\n  big: {source: ./big}\n  small: {source: ./small}\n"
    )
    (found,) = place.wrong(text.replace("LIMIT", "3.1GiB"))
    assert (found.code, found.path, found.line) == ("E703", "memory.limit", 3)
    assert found.message.startswith(
        "the models need 2 GiB (big 1 GiB + small 1 GiB) for their weights and one request each, and 2 engines take "
        "100 MiB each beside that: 2.2 GiB together, where they may use 3.1 GiB - 1 GiB reserve = "
    )
    assert found.hint.startswith("give memory.limit 3.2GiB or more")
    sound = text.replace("LIMIT", "3.2GiB")
    assert {d.code for d in place.resolve(sound).warnings} <= {"W608", "W702"}
    on_demand = "  rare: {source: ./rare, load: on_demand}\n"
    assert [found.code for found in place.wrong(sound + on_demand)] == ["E702"]
    assert [found.code for found in place.wrong(text.replace("LIMIT", "4.2GiB") + on_demand)] == ["E703"]


def test_a_limit_that_is_more_than_the_machine_has(place: Place) -> None:
    sparse(place.folder / "big", 17 * GIB)
    text = SERVERS + "memory: {limit: 1TiB}\nmodels: {big: {source: ./big}}\n"
    (first,) = _warnings(place.resolve(text))
    assert (first.code, first.path, first.line) == ("W704", "memory.limit", 3)
    assert first.message == "is 1 TiB, and the machine has 16 GiB"
    (place.folder / "dev.yaml").write_text(text)
    seen = look(load_manifest(place.folder / "dev.yaml", {}), Machine(16 * GIB, float32=True), place.cache)
    (found,) = seen.wrong
    assert found.code == "E702"
    assert found.message.endswith("and may use 16 GiB (all of the machine)")
    assert seen.desired.memory_limit_bytes == 16 * GIB


def test_a_limit_that_no_process_fits_into(place: Place) -> None:
    sparse(place.folder / "tiny", 2**16)
    (found,) = place.wrong(SERVERS + "memory: {limit: 50MiB}\nmodels:\n  tiny: {source: ./tiny}\n")
    assert (found.code, found.path) == ("E703", "memory.limit")
    assert "and its engine takes 100 MiB beside that" in found.message
    assert found.hint.startswith("give memory.limit 1")


def test_models_that_do_not_fit_into_the_machine(place: Place) -> None:
    sparse(place.folder / "big", 17 * GIB)
    text = SERVERS + "models: {big: {source: ./big}}\n"
    (found,) = place.wrong(text)
    assert found.path == "models"
    assert found.message.endswith("and may use 16 GiB (all of the machine)")
    assert place.resolve(text, machine_memory=18 * GIB).memory_limit_bytes == 0


def test_a_model_that_does_not_fit_into_its_own_limit(place: Place) -> None:
    sparse(place.folder / "big", 5 * GIB)
    (found,) = place.wrong(SERVERS + "models:\n  big: {source: ./big, memory_limit: 4GiB}\n")
    assert (found.path, found.line, found.column) == ("models.big.memory_limit", 4, 38)
    assert found.message == "is 4 GiB, but weights 5 GiB are needed"


def test_the_first_request_is_a_part_of_what_is_needed(place: Place) -> None:
    sparse(place.folder / "big", 4 * GIB, **GEOMETRY)
    (found,) = place.wrong(SERVERS + "models:\n  big: {source: ./big, memory_limit: 4GiB}\n")
    assert found.code == "E701"
    assert found.message.startswith("is 4 GiB, but weights 4 GiB + one request ")
    assert found.hint.startswith("give 4.1GiB or more")


def test_rows_that_have_to_wait_are_a_warning(place: Place) -> None:
    sparse(place.folder / "big", 2 * GIB, **GEOMETRY)
    desired = place.resolve(SERVERS + "models:\n  big: {source: ./big, memory_limit: 4GiB}\n")
    (found,) = _warnings(desired)
    assert (found.code, found.severity, found.path) == ("W701", "warning", "models.big.memory_limit")
    assert found.message == (
        "has room for 6 requests of 8192 tokens at once, and max_rows is 32: others wait in the queue"
    )
    assert found.hint == "all at once need 12GiB; shorter ones need less"
    sound = "models:\n  big: {source: ./big, memory_limit: 4GiB, batching: {max_rows: 6}}\n"
    assert _warnings(place.resolve(SERVERS + sound)) == []


def test_a_context_that_never_fits_is_a_warning(place: Place) -> None:
    sparse(place.folder / "big", 2 * GIB, **GEOMETRY)
    desired = place.resolve(SERVERS + "models:\n  big: {source: ./big, memory_limit: 2250MiB}\n")
    (found,) = _warnings(desired)
    longest = desired.models[0].memory.context_within(2250 * MIB)
    assert 1000 < longest < 8192
    assert found.message == (
        f"has room for one request of {longest} tokens at most, where the context has 8192: longer ones are refused"
    )
    sound = f"models:\n  big: {{source: ./big, memory_limit: 2250MiB, kv_cache: {{max_context: {longest}}}}}\n"
    assert "one request" not in "".join(d.message for d in place.resolve(SERVERS + sound).warnings)


def test_a_prefix_cache_that_has_no_room(place: Place) -> None:
    sparse(place.folder / "big", 2 * GIB, **GEOMETRY)
    text = (
        "models:\n  big: {source: ./big, memory_limit: 3GiB, batching: {max_rows: 1}, kv_cache: {prefix_cache: 1GiB}}"
    )
    (found,) = _warnings(place.resolve(SERVERS + text))
    assert (found.code, found.path) == ("W703", "models.big.kv_cache.prefix_cache")
    assert found.message.startswith("is 1 GiB, but memory_limit leaves ")


def test_all_rows_at_their_longest_are_a_warning(place: Place) -> None:
    sparse(place.folder / "big", 2 * GIB, **GEOMETRY)
    sparse(place.folder / "small", GIB, **GEOMETRY)
    models = "models:\n  big: {source: ./big}\n  small: {source: ./small, memory_limit: 3GiB}\n"
    first, second = _warnings(place.resolve("memory: {limit: 12GiB}\n" + SERVERS + models))
    assert (first.code, second.code) == ("W701", "W702")
    assert second.path == "memory.limit"
    assert second.message == (
        "with every row at its longest the models take 14.8 GiB (big 11.8 GiB + small 3 GiB), their processes 200 MiB, "
        "and may use 12 GiB"
    )
    assert second.hint == "lower kv_cache.max_context or batching.max_rows of big, or give it a memory_limit"


def test_models_on_demand_need_room_for_the_largest_only(place: Place) -> None:
    for name, size in (("big", 9), ("other", 8), ("small", 3)):
        sparse(place.folder / name, size * GIB)
    text = SERVERS + "memory: {limit: 13GiB}\nmodels:\n  small: {source: ./small}\n"
    lazy = [f"  {name}: {{source: ./{name}, load: on_demand}}\n" for name in ("big", "other")]
    assert len(place.resolve(text + "".join(lazy)).models) == 3
    (found,) = place.wrong(text.replace("13GiB", "11GiB") + "".join(lazy))
    assert "the models need 12 GiB (big 9 GiB + small 3 GiB)" in found.message
