"""The engine with a draft says what it says without one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine import decoding
from runner.engine.batch import DecodeBatch, StepResult
from runner.engine.loader import LoadedModel, load
from runner.engine.pacing import Pacing
from runner.engine.speculative import proposer
from runner.engine.speculative.loading import speculate
from runner.protocol import AdapterSource, Configure, Step
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Answer, Driver, active_memory, generate
from tests.engine.speculative.drafts import SLACK, Kind, Scripted, always, draft_folder, erratic, speculating
from tests.engine.tiny import encode

TEXT = encode("the quick brown fox jumps over the lazy dog. hello world, how are you today? def main(): return 42") * 2
PROMPTS = [TEXT[:20], TEXT[3:40], TEXT[:1], TEXT[7:9], TEXT[2:33]]
FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]

Drafts = Callable[..., Path]


@pytest.fixture(autouse=True, params=[True])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rounds are started before those before them are read: as on a GPU, and where asked as on the CPU."""
    given: bool = request.param
    monkeypatch.setattr(decoding, "rounds_ahead", lambda: given)
    return given


BOTH = pytest.mark.parametrize("ahead", [True, False], indirect=True)


@pytest.fixture(scope="session")
def drafts(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    """`drafts(model_type, kind)`: a draft's folder."""
    built: dict[tuple[str, Kind], Path] = {}

    def get(model_type: str, kind: Kind) -> Path:
        key = (model_type, kind)
        if key not in built:
            built[key] = draft_folder(model_folder(model_type), tmp_path_factory.mktemp("draft") / kind, kind)
        return built[key]

    return get


@pytest.fixture(scope="session")
def targets(model_folder: ModelFolder) -> Callable[[str], LoadedModel]:
    """`targets(model_type)`: a model that can take tokens back, shared; nothing is loaded into it."""
    loaded: dict[str, LoadedModel] = {}

    def get(model_type: str) -> LoadedModel:
        if model_type not in loaded:
            loaded[model_type] = load(model_folder(model_type), slack=SLACK)
        return loaded[model_type]

    return get


def with_draft(target: LoadedModel, draft: Path, policy: Scripted, **limits: Any) -> Driver:
    return Driver(target, speculation=speculating(target, draft, policy), num_draft_tokens=5, **limits)


def same(found: dict[int, Answer], expected: dict[int, Answer]) -> bool:
    return {i: (a.text, a.tokens, a.finish_reason) for i, a in found.items()} == {
        i: (a.text, a.tokens, a.finish_reason) for i, a in expected.items()
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "filtered": {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "min_p": 0.02, "seed": 3},
    "penalised": {
        "repetition_penalty": 1.4,
        "repetition_context_size": 6,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {40: 3.0},
    },
}


@BOTH
def test_rows_of_which_the_draft_has_missed_too_much_are_read_anew(
    targets: Callable[[str], LoadedModel], drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposer, "_READS", 4)
    lengths = cycle([2, 3, *[0] * 9])
    target = targets("llama")
    requests = [generate(i, prompt=PROMPTS[i % len(PROMPTS)], max_tokens=30) for i in range(4)]
    expected = Driver(target, max_rows=4).run(requests)
    driver = with_draft(target, drafts("llama", "self"), Scripted(lambda: next(lengths)), max_rows=4)
    assert same(driver.run(requests), expected)
    assert driver.engine.stats().drafted_tokens_total > 20


@pytest.mark.parametrize("kind", ["self", "perturbed", "unrelated"])
@pytest.mark.parametrize(
    ("model_type", "ahead"), [*((name, True) for name in FAMILIES), ("llama", False)], indirect=["ahead"]
)
def test_a_batch_says_the_same_with_a_draft(
    targets: Callable[[str], LoadedModel], drafts: Drafts, model_type: str, kind: Kind
) -> None:
    """Rows of all settings, more than fit into the batch at once, in rounds of all lengths and plain steps."""
    target = targets(model_type)
    requests = [
        generate(i, prompt=PROMPTS[i % len(PROMPTS)], max_tokens=12 + i, **fields)
        for i, fields in enumerate([*SETTINGS.values()] * 2)
    ]
    expected = Driver(target, max_rows=4).run(requests)
    driver = with_draft(target, drafts(model_type, kind), erratic(), max_rows=4)
    assert same(driver.run(requests), expected)
    stats = driver.engine.stats()
    rate = stats.accepted_tokens_total / stats.drafted_tokens_total
    low, high = {"self": (0.99, 1.0), "perturbed": (0.1, 0.99), "unrelated": (0.0, 0.2)}[kind]
    assert low <= rate <= high


def test_adapters_apply_to_what_is_verified(model_folder: ModelFolder, drafts: Drafts, tmp_path: Path) -> None:
    target = load(model_folder("llama"), slack=SLACK)
    adapter = write_mlx(tmp_path / "a", draw(linear_shapes(target, ATTENTION), 4, 1), keys=None, scale=1.0)
    plain, driver = Driver(target), with_draft(target, drafts("llama", "self"), always(4))
    requests = [generate(i, prompt=p, max_tokens=25, adapter="a" if i % 2 else "") for i, p in enumerate(PROMPTS)]
    plain.engine.load_adapter(AdapterSource("a", str(adapter)))
    expected = plain.run(requests)
    plain.engine.drop_adapter("a")
    driver.engine.load_adapter(AdapterSource("a", str(adapter)))
    assert same(driver.run(requests), expected)
    usage = [driver.answers[i].usage for i in range(len(PROMPTS))]
    assert all(u is not None and u.rejected_tokens <= 4 for u in usage[::2]), "only what lies beyond the end"
    assert all(u is not None and u.rejected_tokens > u.accepted_tokens for u in usage[1::2])


def test_rows_without_a_seed_are_accepted_by_rejection(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    """A draft that is the target is always right; and where only one token is possible, any draft leads to it."""
    target = targets("llama")
    driver = with_draft(target, drafts("llama", "self"), always(4))
    answers = driver.run([generate(i, prompt=p, max_tokens=25, temperature=1.0) for i, p in enumerate(PROMPTS[:2])])
    stats = driver.engine.stats()
    assert stats.accepted_tokens_total >= 0.97 * stats.drafted_tokens_total
    greedy = Driver(target).run([generate(i, prompt=p, max_tokens=25) for i, p in enumerate(PROMPTS)])
    assert not same(answers, {i: greedy[i] for i in range(2)})
    driver = with_draft(target, drafts("llama", "unrelated"), erratic())
    sampled = [generate(i, prompt=p, max_tokens=25, temperature=1.0, top_k=1) for i, p in enumerate(PROMPTS)]
    assert same(driver.run(sampled), greedy)


def test_usage_and_counters_tell_what_became_of_proposals(
    targets: Callable[[str], LoadedModel], drafts: Drafts
) -> None:
    driver = with_draft(targets("llama"), drafts("llama", "self"), always(4))
    answer = driver.one(prompt=TEXT[:9], max_tokens=12)
    # The first step's round gives five tokens, the second five, the third the last two of its five.
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.tokens) == (12, 12)
    assert (answer.usage.accepted_tokens, answer.usage.rejected_tokens) == (10, 2)
    stats = driver.engine.stats()
    assert (stats.drafted_tokens_total, stats.accepted_tokens_total) == (12, 12)
    assert stats.completion_tokens_total == 12


def test_one_frame_a_round_with_all_new_tokens(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    driver = with_draft(targets("llama"), drafts("llama", "self"), always(4))
    for i in range(3):
        driver.engine.submit(generate(i, prompt=TEXT[:9], max_tokens=20))
    frames = []
    while driver.engine.busy:
        before = len(driver.frames)
        driver.engine.step()
        frames += [frame for frame in driver.frames[before:] if isinstance(frame, Step)]
    assert [[delta.tokens for delta in frame.deltas] for frame in frames] == [[5, 5, 5]] * 4


@BOTH
def test_the_next_round_starts_before_the_last_is_read_where_that_saves_time(
    targets: Callable[[str], LoadedModel], drafts: Drafts, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    happened: list[str] = []
    sample, read = DecodeBatch.sample, StepResult.read

    def sampling(self: DecodeBatch, mask: Any) -> StepResult:
        happened.append("start")
        return sample(self, mask)

    def reading(self: StepResult) -> Any:
        happened.append("read")
        return read(self)

    monkeypatch.setattr(DecodeBatch, "sample", sampling)
    monkeypatch.setattr(StepResult, "read", reading)
    driver = with_draft(targets("llama"), drafts("llama", "perturbed"), always(3))
    driver.run([generate(i, prompt=prompt, max_tokens=40) for i, prompt in enumerate(PROMPTS[:2])])
    text = " ".join(happened)
    # The first tokens of a batch do not wait for the next round to be built.
    assert text.startswith("start read start start read start read" if ahead else "start read start read start read")


def test_rounds_are_ahead_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for device, expected in ((mx.cpu, False), (mx.gpu, True)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert decoding.rounds_ahead() is expected


@BOTH
def test_no_round_is_started_for_a_row_that_has_ended_unless_they_are_ahead(
    targets: Callable[[str], LoadedModel], drafts: Drafts, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    rounds: list[int] = []
    sample = DecodeBatch.sample

    def sampling(self: DecodeBatch, mask: Any) -> StepResult:
        result = sample(self, mask)
        rounds.append(result.proposed)
        return result

    monkeypatch.setattr(DecodeBatch, "sample", sampling)
    driver = with_draft(targets("llama"), drafts("llama", "self"), always(4))
    driver.one(prompt=PROMPTS[0], max_tokens=10)
    assert rounds == [4] * (3 if ahead else 2)


@BOTH
@pytest.mark.parametrize("chunk", [32, 8])
def test_nothing_is_proposed_on_the_cpu_while_the_batch_fills_up_with_short_prompts(
    targets: Callable[[str], LoadedModel],
    drafts: Drafts,
    monkeypatch: pytest.MonkeyPatch,
    ahead: bool,
    chunk: int,
) -> None:
    """A long prompt takes its chunks one by one, and those that decode go on with rounds meanwhile."""
    steps: list[tuple[int, int]] = []
    sample = DecodeBatch.sample

    def sampling(self: DecodeBatch, mask: Any) -> StepResult:
        result = sample(self, mask)
        steps.append((len(result.rows), result.proposed))
        return result

    monkeypatch.setattr(DecodeBatch, "sample", sampling)
    # All layers of a prompt's call at once, however long they take.
    monkeypatch.setattr(Pacing, "knows", lambda self, decoding: True)
    monkeypatch.setattr(Pacing, "layers", lambda self, tokens, layers, decoding, waiting: layers)
    driver = with_draft(targets("llama"), drafts("llama", "self"), always(2), max_rows=4, prefill_step_size=chunk)
    driver.run([generate(i, prompt=TEXT[i : i + 30], max_tokens=60) for i in range(4)])
    assert {rows for rows, _ in steps} >= {1, 2, 3}, "they come one by one"
    full = 0 if ahead or chunk < 30 else steps.index((4, 2))
    assert {proposed for _, proposed in steps[full:]} == {2}
    assert {proposed for _, proposed in steps[:full]} <= {0}
    assert full == (3 if chunk > 30 and not ahead else 0)


def test_a_plain_step_is_read_before_a_round_unless_that_is_ahead(
    targets: Callable[[str], LoadedModel], drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the draft has to catch up with then ends where the row does: it has all of it, and is right every time."""
    monkeypatch.setattr(decoding, "rounds_ahead", lambda: False)
    lengths = cycle([0, 0, 3])
    target = targets("llama")
    request = generate(0, prompt=PROMPTS[0], max_tokens=60, temperature=1.0, seed=5)
    driver = with_draft(target, drafts("llama", "self"), Scripted(lambda: next(lengths)))
    assert same(driver.run([request]), Driver(target).run([request]))
    stats = driver.engine.stats()
    assert stats.accepted_tokens_total == stats.drafted_tokens_total > 0


def test_logprobs_come_for_every_token(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    target = targets("llama")
    fields: dict[str, Any] = {"prompt": TEXT[:9], "max_tokens": 17, "logprobs": 3, "temperature": 1.0, "seed": 4}
    expected = Driver(target).one(**fields)
    found = with_draft(target, drafts("llama", "perturbed"), always(3)).one(**fields)
    assert len(found.logprobs) == len(expected.logprobs) == 17
    for mine, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert (mine.token, [entry[0] for entry in mine.top]) == (other.token, [entry[0] for entry in other.top])
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_row_ends_at_the_right_token(targets: Callable[[str], LoadedModel], drafts: Drafts, limit: int) -> None:
    """By length anywhere in a round, and by a stop string that ends anywhere in it."""
    target, draft = targets("llama"), drafts("llama", "self")
    whole = Driver(target).one(prompt=TEXT[:9], max_tokens=12).text
    assert len(whole) > 12
    cut = Driver(target).one(prompt=TEXT[:9], max_tokens=limit)
    driver = with_draft(target, draft, always(4))
    assert same({0: driver.one(prompt=TEXT[:9], max_tokens=limit)}, {0: cut})
    stop = whole[limit : limit + 2]
    stopped = Driver(target).one(prompt=TEXT[:9], max_tokens=12, stop=[stop])
    assert same({0: driver.one(prompt=TEXT[:9], max_tokens=12, stop=[stop])}, {0: stopped})


def test_the_end_token_in_a_round_ends_the_row(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    target = targets("llama")
    (end,) = target.tokenizer.eos_ids
    fields: dict[str, Any] = {"prompt": TEXT[:9], "max_tokens": 60, "temperature": 1.5, "logit_bias": {end: 4.0}}
    ends = 0
    for seed in range(8):
        expected = Driver(target).one(seed=seed, **fields)
        found = with_draft(target, drafts("llama", "self"), always(4)).one(seed=seed, **fields)
        assert same({0: found}, {0: expected})
        ends += found.finish_reason == "stop"
    assert ends >= 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_conversations_go_on_from_what_rounds_have_cached(
    targets: Callable[[str], LoadedModel], drafts: Drafts, model_type: str
) -> None:
    """Rows that ended in the middle of a round leave a prefix that is good for the next turn."""
    target = targets(model_type)
    plain = Driver(target)
    driver = with_draft(target, drafts(model_type, "perturbed"), erratic(3), prefix_cache_bytes=1 << 20)
    texts = {i: PROMPTS[i] for i in range(3)}
    for turn in range(3):
        requests = [generate(10 * turn + i, prompt=p, max_tokens=11 + i) for i, p in texts.items()]
        expected = plain.run(requests)
        found = driver.run(requests)
        assert same(found, expected)
        texts = {i: p + encode(found[10 * turn + i].text) + TEXT[turn : turn + 5] for i, p in texts.items()}
    assert driver.engine.stats().cached_tokens_total > 0


def test_a_changed_length_holds_at_once(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    driver = with_draft(targets("llama"), drafts("llama", "self"), always(4))
    driver.engine.configure(Configure(num_draft_tokens=0))
    driver.one(prompt=TEXT[:9], max_tokens=12)
    assert driver.engine.stats().drafted_tokens_total == 0
    driver.engine.configure(Configure(num_draft_tokens=2))
    driver.one(prompt=TEXT[:9], max_tokens=12)
    assert driver.engine.stats().drafted_tokens_total == 8


def test_cancelled_rows_leave_and_the_others_go_on(targets: Callable[[str], LoadedModel], drafts: Drafts) -> None:
    target = targets("llama")
    expected = Driver(target).run([generate(i, prompt=p, max_tokens=40) for i, p in enumerate(PROMPTS)])
    driver = with_draft(target, drafts("llama", "perturbed"), erratic(2), max_rows=3)
    for i, prompt in enumerate(PROMPTS):
        driver.engine.submit(generate(i, prompt=prompt, max_tokens=40))
    for _ in range(4):
        driver.engine.step()
    driver.engine.cancel(0)
    driver.engine.cancel(4)
    driver.drain()
    assert driver.answers[0].ends == 0
    assert expected[0].text.startswith(driver.answers[0].text)
    assert same({i: driver.answers[i] for i in (1, 2, 3)}, {i: expected[i] for i in (1, 2, 3)})


def test_nothing_is_left_behind(model_folder: ModelFolder, drafts: Drafts) -> None:
    driver = with_draft(load(model_folder("llama")), drafts("llama", "perturbed"), erratic(4), max_rows=4)
    memory = []
    for turn in range(5):
        driver.run([generate(10 * turn + i, prompt=p, max_tokens=20) for i, p in enumerate(PROMPTS)])
        memory.append(active_memory())
    assert memory[-1] <= memory[0]


def test_what_breaks_a_round_ends_its_rows_and_not_the_loop(
    targets: Callable[[str], LoadedModel], drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = targets("llama")
    speculation = speculating(target, drafts("llama", "self"), always(3))
    driver = Driver(target, speculation=speculation, num_draft_tokens=3, max_rows=2)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=TEXT[:9], max_tokens=12))
    driver.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(speculation.proposer, "propose", lambda *_: 1 / 0)
        driver.engine.step()
    driver.drain()
    expected = Driver(target).one(prompt=TEXT[:9], max_tokens=12)
    assert [driver.answers[i].finish_reason for i in range(2)] == ["error", "error"]
    assert driver.answers[2].text == expected.text


def test_the_real_policy_speculates_with_a_good_draft_and_not_with_a_bad_one(
    targets: Callable[[str], LoadedModel], drafts: Drafts
) -> None:
    """On a machine where a round costs what a step does; how good a draft is has to be found out."""
    target = targets("llama")
    shares = {}
    for kind in ("self", "unrelated"):
        speculation = speculating(target, drafts("llama", kind))
        driver = Driver(target, speculation=speculation, num_draft_tokens=5)
        took = speculation.policy.took
        flat = lambda step: took(replace(step, seconds=0.01 + 0.002 * step.length, timed=not step.shared))  # noqa: E731, B023
        speculation.policy.took = flat
        speculation.policy.costs._target = lambda tokens: 0.01
        speculation.policy.costs._draft = lambda tokens: 0.002
        driver.run([generate(i, prompt=TEXT[i : 20 + i], max_tokens=150) for i in range(4)])
        stats = driver.engine.stats()
        shares[kind] = stats.drafted_tokens_total / stats.completion_tokens_total
    assert shares["self"] > 0.6
    assert shares["unrelated"] < 0.5


def test_a_rehearsal_has_rounds_of_each_length_and_leaves_no_trace(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    target = load(folder, slack=SLACK)
    speculation, _ = speculate(draft_folder(folder, tmp_path / "draft", "self"), target, SLACK)
    assert speculation is not None
    driver = Driver(target, speculation=speculation, num_draft_tokens=4)
    proposed: list[int] = []
    decide = speculation.decide

    def recorded(*arguments: Any, **more: Any) -> int:
        proposed.append(decide(*arguments, **more))
        return proposed[-1]

    speculation.decide = recorded  # type: ignore[method-assign]
    assert driver.engine.rehearse() is None
    assert {2, 4} <= set(proposed)
    assert not driver.frames
    stats = driver.engine.stats()
    assert (stats.drafted_tokens_total, stats.accepted_tokens_total, stats.rows) == (0, 0, 0)
    assert not speculation.policy.steps
    assert not speculation.policy.tried
    assert speculation.policy.allowance.seconds == 0
    del proposed[:]
    driver.one(prompt=[1, 2, 3], max_tokens=4)
    assert set(proposed) == {0}, "plain steps are timed first"
