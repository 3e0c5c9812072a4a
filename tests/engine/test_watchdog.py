"""What is really used, against the limit: nothing is taken up, what is kept is given back, then the process goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.engine.loader import LoadedModel, load
from runner.engine.memory import cache_bytes_per_token
from runner.engine.watchdog import Watchdog, in_use_beside, resident
from runner.environment import engine_environment
from runner.protocol import Configure
from tests.engine.drive import Driver, generate
from tests.engine.tiny import build_model, encode

pytestmark = pytest.mark.mlx
PROMPT = encode("the quick brown fox, hello world. def main")


class Usage:
    """What a process uses, of which some is `kept` for later, and some `unused` by its allocators."""

    def __init__(self, used: int, kept: int = 0, unused: int = 0) -> None:
        self.used = used
        self.kept = kept
        self.unused = unused

    def trim(self) -> None:
        self.used -= self.unused
        self.unused = 0

    def release(self, nbytes: int) -> int:
        given = min(self.kept, nbytes)
        self.kept -= given
        self.used -= given
        return given


def watchdog(usage: Usage, limit: int = 100) -> Watchdog:
    return Watchdog(lambda: limit, usage.release, lambda: usage.used, usage.trim, slack=0)


def test_below_the_limit_nothing_happens() -> None:
    dog = watchdog(Usage(100, kept=50))
    assert dog.look(busy=True)
    assert (dog.closed, dog.over) == (False, 0)
    assert watchdog(Usage(10**12), limit=0).look(busy=True)


def test_what_allocators_keep_is_given_back_first() -> None:
    usage = Usage(130, kept=50, unused=40)
    dog = watchdog(usage)
    assert dog.look(busy=True)
    assert (usage.used, usage.kept, dog.closed, dog.over) == (90, 50, False, 0)


def test_then_what_is_kept_for_later_is_given_back() -> None:
    usage = Usage(140, kept=50, unused=10)
    dog = watchdog(usage)
    assert dog.look(busy=True)
    assert (usage.used, usage.kept, dog.over) == (100, 20, 0)
    assert dog.closed, "it is at the limit still"
    usage.used = 90
    assert dog.look(busy=True)
    assert not dog.closed


def test_it_goes_on_with_what_it_works_on_and_then_asks_to_be_replaced() -> None:
    dog = watchdog(Usage(120))
    assert dog.look(busy=True)
    assert dog.closed
    assert not dog.look(busy=False)
    assert dog.over == 120


def test_far_above_it_does_not_wait() -> None:
    assert not watchdog(Usage(126)).look(busy=True)


def test_a_closed_engine_takes_up_one_at_a_time(llama: LoadedModel) -> None:
    driver = Driver(llama)
    driver.engine.room.closed = True
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=5))
    assert driver.most_rows() == 1
    assert [driver.answers[i].tokens for i in range(3)] == [5] * 3


def test_what_is_in_use_is_the_process(llama: LoadedModel) -> None:
    assert resident() > llama.weights_bytes
    assert in_use_beside(0) == pytest.approx(resident(), rel=0.1)
    assert in_use_beside(1 << 60) >= llama.weights_bytes, "what MLX counts"


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such allocators")
@pytest.mark.parametrize("prepared", [False, True], ids=["the C library's", "the engine's"])
def test_what_is_freed_between_what_stays_goes_back_to_the_system(prepared: bool) -> None:
    script = (
        "import mlx.core as mx\n"
        "from runner.engine.watchdog import resident, trim\n"
        "arrays = [mx.ones((100, 100 + i % 100)) for i in range(1000)]\n"
        "mx.eval(arrays)\n"
        "del arrays[::2]\n"
        "before = resident()\n"
        "trim()\n"
        "print(before - resident())\n"
    )
    environ = {"PYTHONPATH": str(Path(__file__).parents[2]), **(engine_environment({}) if prepared else {})}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=True).stdout
    assert int(output) > 20 * 2**20, "of 30 MB"


def room_for(llama: LoadedModel, tokens: int) -> int:
    return int(llama.weights_bytes + tokens * cache_bytes_per_token(llama.model, llama.layout))


def test_a_grant_in_place_is_kept_to_and_lifted(llama: LoadedModel) -> None:
    driver = Driver(llama, prefix_cache_bytes=1 << 20)
    driver.one(prompt=PROMPT * 10, max_tokens=4)
    assert driver.engine.stats().prefix_cache_bytes
    driver.engine.configure(Configure(memory_limit_bytes=room_for(llama, 2 * 256)))
    assert driver.engine.stats().budget_bytes == room_for(llama, 2 * 256)
    for i in range(4):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=10))
    most = 0
    while driver.engine.busy:
        driver.engine.step()
        stats = driver.engine.stats()
        assert stats.reserved_bytes <= stats.budget_bytes
        most = max(most, stats.rows)
    assert most == 2
    driver.engine.configure(Configure(memory_limit_bytes=room_for(llama, 256)))
    refused = driver.one(prompt=PROMPT, max_tokens=400).rejected
    assert refused is not None
    assert (refused.status, refused.code) == (503, "memory_full")
    driver.engine.configure(Configure(memory_limit_bytes=room_for(llama, 10_000)))
    assert driver.one(prompt=PROMPT, max_tokens=400).rejected is None


def test_one_that_asked_for_no_length_ends_where_memory_does(tmp_path: Path) -> None:
    small = {"max_position_embeddings": 1024, "num_hidden_layers": 1}
    llama = load(build_model(tmp_path, config=small))
    driver = Driver(llama, memory_limit=room_for(llama, 4 * 256 + 100))
    for i in range(2):
        driver.engine.submit(
            generate(i, prompt=PROMPT, max_tokens=0, logit_bias=dict.fromkeys(llama.tokenizer.eos_ids, -100.0))
        )
    over = 0
    while driver.engine.busy:
        driver.engine.step()
        over = over + 1 if driver.engine.stats().reserved_bytes > driver.engine.budget.limit else 0
        assert over <= 18, "it is looked at every 16 steps, and counted 256 tokens ahead"
    assert [driver.answers[i].finish_reason for i in range(2)] == ["length", "length"]
    alone = limited_context(driver)
    assert min(driver.answers[i].tokens for i in range(2)) < alone, "memory ended one before the context did"


def limited_context(driver: Driver) -> int:
    """Tokens of an answer that nothing but the context ends."""
    return driver.engine.intake.context(driver.engine.limits) - len(PROMPT)
