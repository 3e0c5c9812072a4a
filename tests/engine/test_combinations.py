"""Every pair and triple of features in one batch: a row says what it says alone, to the token.

A new feature is an entry of FEATURES, and a line where `Scenario` makes it happen. Each combination runs on one of the
model families here, and on all of them in the nightly form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import structs

from runner.engine.kv.quantised import Quantisation
from runner.engine.loader import LoadedModel, load
from runner.protocol import AdapterSource, Generate, Grammar
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Answer, Driver, generate
from tests.engine.speculative.drafts import draft_folder, erratic, speculating
from tests.engine.tiny import encode

FEATURES: Final = ("adapter", "draft", "kv bits", "kv start", "prefix hit", "grammar", "seed", "join", "cancel")
FAMILIES: Final = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2")
COMBINATIONS: Final = [
    c for size in (2, 3) for c in itertools.combinations(FEATURES, size) if not {"kv bits", "kv start"} <= {*c}
]
TEXT: Final = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main():") * 3
GRAMMAR: Final = Grammar("regex", "[a-z ]{3,40}", "regex")
SUBJECT: Final = 1000
SHARED: Final = 20
FORMATS: Final = {"kv bits": Quantisation(8, 32), "kv start": Quantisation(8, 32, 50)}
"""With a start, the subject comes to it within its answer, and its neighbours before, later and never."""

TIE: Final = 0.05
"""Log-probability by which the best token of a quantised row may be ahead and yet lose in another batch."""

pytestmark = pytest.mark.nightly


class Engines:
    """Models, adapters and drafts of a test run, built when they are first asked for."""

    def __init__(self, model_folder: ModelFolder, scratch: Callable[[str], Path]) -> None:
        self._folder, self._scratch = model_folder, scratch
        self._adapters: dict[str, list[AdapterSource]] = {}
        self._drafts: dict[str, Path] = {}
        self._alone: dict[tuple[str, Quantisation | None], Driver] = {}
        self._batched: dict[tuple[str, frozenset[str]], Driver] = {}

    def alone(self, family: str, features: Sequence[str]) -> Driver:
        """One row at a time, in large chunks, of nothing known before."""
        key = (family, packing(features))
        if key not in self._alone:
            self._alone[key] = self._driver(family, self._load(*key), max_rows=1, prefill_step_size=4096)
        return self._alone[key]

    def batched(self, family: str, features: Sequence[str]) -> Driver:
        """An engine with few rows and small chunks, and what the features need; it knows no prompts."""
        key = (family, frozenset(features) & {"draft", *FORMATS, "prefix hit"})
        if key not in self._batched:
            self._batched[key] = self._new_batched(family, features)
        for adapter in ("", "a", "b"):
            self._batched[key].engine._prefixes.evict(adapter)
        return self._batched[key]

    def _new_batched(self, family: str, features: Sequence[str]) -> Driver:
        target = self._load(family, packing(features))
        prefixes = 1 << 24 if "prefix hit" in features else 0
        limits = {"max_rows": 4, "prefill_step_size": 16, "prefix_cache_bytes": prefixes}
        speculation = None
        # What has been computed cannot be taken back from a recurrent state, so such a model has no draft.
        if "draft" in features and target.layout.trimmable:
            if family not in self._drafts:
                folder = self._folder(family, wide=True)
                self._drafts[family] = draft_folder(folder, self._scratch("draft") / family, "perturbed")
            limits["num_draft_tokens"] = 5
            speculation = speculating(target, self._drafts[family], erratic())
        return self._driver(family, target, speculation=speculation, **limits)

    def _load(self, family: str, quantisation: Quantisation | None) -> LoadedModel:
        return load(self._folder(family, wide=True), slack=16, quantisation=quantisation)

    def _driver(self, family: str, target: LoadedModel, **fields: Any) -> Driver:
        if family not in self._adapters:
            shapes = linear_shapes(target, ATTENTION)
            self._adapters[family] = [
                AdapterSource(name, str(write_mlx(self._scratch(name), draw(shapes, rank, rank), keys=None, scale=1.0)))
                for name, rank in (("a", 4), ("b", 2))
            ]
        driver = Driver(target, **fields)
        for adapter in self._adapters[family]:
            driver.engine.load_adapter(adapter)
        return driver


@pytest.fixture(scope="module")
def engines(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(model_folder, tmp_path_factory.mktemp)


def packing(features: Sequence[str]) -> Quantisation | None:
    """How keys and values are kept."""
    return next((how for name, how in FORMATS.items() if name in features), None)


class Scenario:
    """A subject with the features, among neighbours that have some of them."""

    def __init__(self, features: Sequence[str]) -> None:
        self.features = features

    def subject(self, number: int) -> Generate:
        """The row that is compared."""
        fields: dict[str, Any] = {"logprobs": 2} if packing(self.features) else {}
        if "adapter" in self.features:
            fields["adapter"] = "a"
        if "seed" in self.features:
            fields |= {"temperature": 0.9, "top_p": 0.95, "seed": 11}
        if "grammar" in self.features:
            fields["grammar"] = GRAMMAR
        return generate(number, prompt=TEXT[3:48], max_tokens=14, **fields)

    def neighbours(self) -> list[Generate]:
        """Of other lengths, samplings and, where adapters are in it, adapters."""
        adapters = ("b", "", "a") if "adapter" in self.features else ("", "", "")
        samplings: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.7, "seed": 5}, {"repetition_penalty": 1.3})
        return [
            generate(i, prompt=TEXT[i : i + length], max_tokens=40, adapter=adapters[i], **samplings[i])
            for i, length in enumerate((7, 31, 60))
        ]

    def run(self, driver: Driver) -> Answer:
        """What the subject says in the batch."""
        if "prefix hit" in self.features:
            adapter = "a" if "adapter" in self.features else ""
            driver.one(prompt=TEXT[3 : 3 + SHARED], max_tokens=2, adapter=adapter)
        if "grammar" in self.features:
            driver.one(prompt=TEXT[:1], max_tokens=1, grammar=GRAMMAR)  # compiled from now on
        first = 10_000 * (1_000 + len(driver.answers))
        neighbours = [structs.replace(request, id=first + request.id) for request in self.neighbours()]
        subject = self.subject(first + SUBJECT)
        # The last neighbour comes when the subject decodes; with "join" the subject comes when the others do.
        arrivals = {12: neighbours[2:]} | ({0: neighbours[:2], 9: [subject]} if "join" in self.features else {})
        if "join" not in self.features:
            arrivals[0] = [neighbours[0], subject, neighbours[1]]
        step = 0
        while driver.engine.busy or step <= 12:
            for request in arrivals.get(step, ()):
                driver.engine.submit(request)
            if "cancel" in self.features and step in (11, 14):
                driver.engine.cancel(first if step == 11 else first + 1)
            driver.engine.step()
            step += 1
        return driver.answers[subject.id]


def check(engines: Engines, family: str, features: Sequence[str]) -> None:
    """Compare the subject in the batch with itself alone."""
    scenario = Scenario(features)
    got = scenario.run(engines.batched(family, features))
    alone = engines.alone(family, features)
    request = scenario.subject(len(alone.answers) + 5000)
    expected = alone.run([request])[request.id]
    assert got.usage is not None
    if "prefix hit" in features:
        assert got.usage.cached_tokens >= SHARED - 1
    if "draft" in features and family != "lfm2":
        assert got.usage.accepted_tokens + got.usage.rejected_tokens > 0
    if got.text != expected.text and packing(features):
        assert_tie(got, expected)
    else:
        assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)


def assert_tie(got: Answer, expected: Answer) -> None:
    """Quantised rows may part where two tokens are as good as each other; says by how much they differ."""
    at = next(i for i, (a, b) in enumerate(zip(got.logprobs, expected.logprobs, strict=False)) if a.token != b.token)
    ahead = expected.logprobs[at].top[0][1] - expected.logprobs[at].top[1][1]
    print(f"parted at token {at}, where the best was ahead by {ahead:.4f}")
    assert ahead < TIE


def named(features: Sequence[str]) -> str:
    return " + ".join(features)


@pytest.mark.parametrize(
    ("family", "features"),
    [(FAMILIES[i % len(FAMILIES)], features) for i, features in enumerate(COMBINATIONS)],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_each_combination_on_a_family(engines: Engines, family: str, features: Sequence[str]) -> None:
    check(engines, family, features)


@pytest.mark.nightly
@pytest.mark.parametrize("features", COMBINATIONS, ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_combination_on_every_family(engines: Engines, family: str, features: Sequence[str]) -> None:
    check(engines, family, features)
