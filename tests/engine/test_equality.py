"""A batch of N rows gives each row the very tokens it gets alone.

Whatever joins, leaves or is cancelled around it; whichever adapter it has; whether its prompt begins in the prefix
cache; whatever grammar it has to match; whatever a draft model proposes; and, with a seed, whichever way it samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.engine.loader import load
from runner.engine.sharing import Sharing
from runner.protocol import AdapterSource, Generate, Grammar
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Answer, Driver, generate
from tests.engine.speculative.drafts import SLACK, Kind, draft_folder, erratic, speculating
from tests.engine.tiny import encode

TEXT = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main(): return 42") * 2
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 8},
    {"repetition_penalty": 1.4, "repetition_context_size": 12},
    {"temperature": 0.7, "seed": 9, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {40: 2.0}},
)

GRAMMARS: tuple[Grammar | None, ...] = (
    None,
    None,
    None,
    Grammar("regex", "[a-z ]{3,40}", "regex"),
    Grammar("lark", 'start: ("(" start ")" | /[0-9]/)+', "lark"),
    Grammar("json", '{"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "type": "object"}', "json"),
)


@dataclass(frozen=True)
class Planned:
    """A request, when it comes, and after how many steps it is cancelled, if at all."""

    arrives: int
    start: int
    length: int
    max_tokens: int
    adapter: str
    sampling: int
    grammar: int
    cancelled_after: int | None

    def request(self, request_id: int) -> Generate:
        prompt = TEXT[self.start : self.start + self.length]
        fields = {**SAMPLINGS[self.sampling], "grammar": GRAMMARS[self.grammar]}
        return generate(request_id, prompt=prompt, adapter=self.adapter, max_tokens=self.max_tokens, **fields)


def plans(adapters: tuple[str, ...], most: int = 14) -> st.SearchStrategy[list[Planned]]:
    """Up to eight requests within a dozen steps, of `most` tokens at most. Few beginnings, so that they are shared."""
    planned = st.builds(
        Planned,
        arrives=st.sampled_from([0, 0, 0, 1, 2, 4, 9]),
        start=st.sampled_from([0, 3, 11]),
        length=st.sampled_from([1, 2, 5, 13, 14, 31, 60]),
        max_tokens=st.integers(1, most),
        adapter=st.sampled_from(adapters),
        sampling=st.integers(0, len(SAMPLINGS) - 1),
        grammar=st.integers(0, len(GRAMMARS) - 1),
        cancelled_after=st.none() | st.none() | st.integers(0, 10),
    )
    return st.lists(planned, min_size=2, max_size=8)


class Pair:
    """Two engines on the same weights: one for batches, one for each request alone, its answers remembered.

    The one for batches may have a draft, whose rounds are of all lengths, with plain steps between them.
    """

    def __init__(
        self,
        folder: Path,
        adapters: dict[str, Path],
        draft: Path | None = None,
        sharing: Sharing | None = None,
        **limits: Any,
    ) -> None:
        target = load(folder, slack=SLACK if draft else 0)
        speculation = None if draft is None else speculating(target, draft, erratic())
        self.batched = Driver(target, speculation=speculation, sharing=sharing, num_draft_tokens=5, **limits)
        self._alone = Driver(load(folder), max_rows=1, prefill_step_size=4096)
        for driver in (self.batched, self._alone):
            for key, path in adapters.items():
                driver.engine.load_adapter(AdapterSource(key, str(path)))
            for grammar in GRAMMARS:
                driver.one(prompt=TEXT[:1], max_tokens=1, grammar=grammar)
        self._known: dict[Planned, Answer] = {}

    def alone(self, planned: Planned) -> Answer:
        if planned not in self._known:
            request = planned.request(len(self._known))
            self._known[planned] = self._alone.run([request])[request.id]
        return self._known[planned]

    def check(self, schedule: list[Planned]) -> None:
        """Run a schedule; every answer is what it is alone, up to where it was cancelled."""
        driver, first = self.batched, len(self.batched.answers) + 10_000 * len(self.batched.frames)
        requests = {first + i: planned for i, planned in enumerate(schedule)}
        step = 0
        while driver.engine.busy or step <= max(planned.arrives for planned in schedule):
            for request_id, planned in requests.items():
                if planned.arrives == step:
                    driver.engine.submit(planned.request(request_id))
                if planned.cancelled_after is not None and planned.arrives + planned.cancelled_after == step:
                    driver.engine.cancel(request_id)
            driver.engine.step()
            step += 1
            assert step < 1000
        for request_id, planned in requests.items():
            expected, got = self.alone(planned), driver.answers.get(request_id, Answer())
            if got.finish_reason is None:
                assert planned.cancelled_after is not None
                assert expected.text.startswith(got.text)
            else:
                assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason), planned
        assert driver.engine.rows == []


@pytest.fixture(scope="module")
def pair(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`pair(model_type, bits, adapters, draft, sharing)`: engines with small chunks, few rows and a prefix cache."""
    built: dict[tuple[str, int, bool, Kind | None, Sharing | None], Pair] = {}

    def get(
        model_type: str,
        bits: int = 0,
        *,
        adapters: bool = False,
        draft: Kind | None = None,
        sharing: Sharing | None = None,
    ) -> Pair:
        key = (model_type, bits, adapters, draft, sharing)
        if key not in built:
            folder = model_folder(model_type, bits)
            paths = {}
            if adapters:
                shapes = linear_shapes(load(folder), (*ATTENTION, "down_proj"))
                for name, rank in (("a", 4), ("b", 2)):
                    path = tmp_path_factory.mktemp(name)
                    paths[name] = write_mlx(path, draw(shapes, rank, rank), keys=None, scale=1.0)
            limits = {"max_rows": 4, "prefill_step_size": 40, "prefix_cache_bytes": 200_000}
            small = None if draft is None else draft_folder(folder, tmp_path_factory.mktemp("draft") / draft, draft)
            built[key] = Pair(folder, paths, small, sharing, **limits)
        return built[key]

    return get


bounded = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@given(schedule=plans(("", "", "a", "b")))
@settings(bounded, max_examples=30)
def test_base_adapters_and_mixes(pair: Callable[..., Pair], schedule: list[Planned]) -> None:
    pair("llama", adapters=True).check(schedule)


@pytest.mark.parametrize("draft", ["perturbed", "unrelated"])
@given(schedule=plans(("", "", "a", "b")))
@settings(bounded, max_examples=12)
def test_with_a_draft(pair: Callable[..., Pair], draft: Kind, schedule: list[Planned]) -> None:
    pair("llama", adapters=True, draft=draft).check(schedule)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("draft", ["self", "perturbed", "unrelated"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
@given(schedule=plans(("", "", "a", "b"), most=60))
@settings(bounded, max_examples=150)
def test_with_a_draft_at_length(
    pair: Callable[..., Pair], model_type: str, draft: Kind, schedule: list[Planned]
) -> None:
    adapters = model_type != "qwen3_moe"
    if not adapters:
        schedule = [replace(planned, adapter="") for planned in schedule]
    pair(model_type, adapters=adapters, draft=draft).check(schedule)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "qwen3_moe"])
@given(schedule=plans(("",)))
@settings(bounded, max_examples=6)
def test_other_architectures_with_a_draft(pair: Callable[..., Pair], model_type: str, schedule: list[Planned]) -> None:
    pair(model_type, draft="perturbed").check(schedule)


@given(schedule=plans(("", "a", "b")))
@settings(bounded, max_examples=8)
def test_quantised(pair: Callable[..., Pair], schedule: list[Planned]) -> None:
    pair("llama", 4, adapters=True).check(schedule)


@given(schedule=plans(("",)))
@settings(bounded, max_examples=8)
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "qwen3_moe", "lfm2"])
def test_other_architectures(pair: Callable[..., Pair], model_type: str, schedule: list[Planned]) -> None:
    """Normalised heads, sliding windows that wrap, experts, and recurrent states."""
    pair(model_type).check(schedule)


@given(schedule=plans(("",)))
@settings(bounded, max_examples=8)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_prompts_that_wait_for_each_other(pair: Callable[..., Pair], model_type: str, schedule: list[Planned]) -> None:
    pair(model_type, sharing=Sharing(times=4, most=2048, rows=1, steps=3)).check(schedule)


@pytest.mark.parametrize("prefixes", [0, 1 << 20], ids=["cold", "with prefixes"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2"])
def test_prompts_of_many_lengths_in_one_prefill(model_folder: ModelFolder, model_type: str, prefixes: int) -> None:
    loaded = load(model_folder(model_type))
    prompts = [TEXT[:2], TEXT[:31], TEXT[:9], TEXT[:1], TEXT[5:20], TEXT[3:30]]
    alone = [Driver(loaded).one(prompt=prompt, max_tokens=12).text for prompt in prompts]
    together = Driver(loaded, prefill_step_size=512, prefix_cache_bytes=prefixes)
    if prefixes:
        together.one(prompt=TEXT[:25], max_tokens=1)
        together.one(prompt=TEXT[3:12], max_tokens=1)
    answers = together.run([generate(i, prompt=prompt, max_tokens=12) for i, prompt in enumerate(prompts)])
    assert [answers[i].text for i in range(len(prompts))] == alone
    assert bool(prefixes) == bool(together.engine.stats().cached_tokens_total)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "lfm2"])
def test_alone_equals_upstream(model_folder: ModelFolder, model_type: str) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    loaded = load(model_folder(model_type))
    for length in (1, 7, 60):
        prompt = TEXT[:length]
        upstream = [int(token) for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=20)]
        driver = Driver(loaded, prefill_step_size=16)
        answer = driver.one(prompt=prompt, max_tokens=20)
        if loaded.tokenizer.eos_ids & set(upstream):
            upstream = upstream[: next(i for i, t in enumerate(upstream) if t in loaded.tokenizer.eos_ids)]
        assert answer.text == loaded.tokenizer.decode_ids(upstream)
