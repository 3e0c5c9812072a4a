"""Every request ends exactly once, whatever happens around it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from msgspec.structs import replace

from runner.engine import startup
from runner.engine.limits import Limits
from runner.engine.loader import LoadedModel, load
from runner.engine.loop import Engine
from runner.errors import EngineDied
from runner.protocol import AdapterSource, Configure, Delta, FromEngine, Generate, Step, Usage
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, active_memory, generate
from tests.engine.tiny import backend, encode

PROMPT = encode("the quick brown fox, hello world. def main")


def greedy_text(llama: LoadedModel, tokens: int = 40) -> str:
    """What the model says to PROMPT."""
    return Driver(llama).one(prompt=PROMPT, max_tokens=tokens).text


def test_counts_tokens_and_ends_by_length(llama: LoadedModel) -> None:
    answer = Driver(llama).one(prompt=PROMPT, max_tokens=7)
    assert (answer.tokens, answer.finish_reason, answer.ends) == (7, "length", 1)
    assert answer.usage is not None
    assert answer.usage == Usage(prompt_tokens=len(PROMPT), completion_tokens=7)


def test_the_context_ends_an_answer(llama: LoadedModel) -> None:
    driver = Driver(llama, max_context=len(PROMPT) + 5)
    answer = driver.one(prompt=PROMPT)
    assert (answer.tokens, answer.finish_reason) == (5, "length")
    refused = driver.one(prompt=[*PROMPT, *PROMPT])
    assert refused.rejected is not None
    assert (refused.rejected.status, refused.rejected.code) == (400, "context_length_exceeded")


def test_an_end_token_stops_and_is_not_text(llama: LoadedModel) -> None:
    end = backend().token_to_id("<|end|>")
    answer = Driver(llama).one(prompt=PROMPT, max_tokens=9, logit_bias={end: 1000.0}, logprobs=0)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", 1, "stop")
    assert answer.logprobs == []


def test_stop_strings_cut_the_text_wherever_tokens_split_them(llama: LoadedModel) -> None:
    text = greedy_text(llama)
    for begin in (3, 8, 13):
        stop = text[begin : begin + 4]
        answer = Driver(llama).one(prompt=PROMPT, max_tokens=40, stop=[stop, "never said"])
        assert answer.finish_reason == "stop"
        assert answer.text == text[: text.index(stop)]


def test_an_unfinished_stop_string_comes_out_at_the_end(llama: LoadedModel) -> None:
    text = greedy_text(llama, 10)
    answer = Driver(llama).one(prompt=PROMPT, max_tokens=10, stop=[text[-3:] + "never"])
    assert (answer.text, answer.finish_reason) == (text, "length")


def test_logprobs_equal_the_models_own(llama: LoadedModel) -> None:
    answer = Driver(llama).one(prompt=PROMPT, max_tokens=6, logprobs=3)
    plain = Driver(llama).one(prompt=PROMPT, max_tokens=6, logprobs=0)
    tokens = list(PROMPT)
    assert len(answer.logprobs) == 6
    for given, bare in zip(answer.logprobs, plain.logprobs, strict=True):
        logits = llama.model(mx.array([tokens]))[0, -1]
        reference = logits - mx.logsumexp(logits)
        best = mx.argsort(-reference)[:3].tolist()
        assert given.logprob == pytest.approx(reference[best[0]].item(), abs=1e-4)
        assert [top[1] for top in given.top] == pytest.approx([reference[i].item() for i in best], abs=1e-4)
        assert [top[0] for top in given.top] == [llama.tokenizer.label(i)[0] for i in best]
        assert (given.token, given.bytes) == llama.tokenizer.label(best[0])
        assert (bare.token, bare.top) == (given.token, [])
        tokens.append(best[0])


def test_rows_decode_while_a_long_prompt_is_prefilled(llama: LoadedModel) -> None:
    driver = Driver(llama, prefill_step_size=16)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=100))
    for _ in range(3):
        driver.engine.step()
    driver.engine.submit(generate(2, prompt=[7] * 160, max_tokens=1))
    before = driver.answers[1].tokens
    steps = 0
    while 2 not in driver.answers:
        driver.engine.step()
        steps += 1
    assert steps >= 10, "the prompt takes ten chunks"
    assert driver.answers[1].tokens - before == steps, "one token a step, chunk or not"


def test_short_prompts_need_not_wait_for_a_long_one(llama: LoadedModel) -> None:
    driver = Driver(llama, prefill_step_size=16, max_rows=3)
    driver.engine.submit(generate(1, prompt=[7] * 320, max_tokens=1))
    driver.engine.step()
    for i in (2, 3, 4):
        driver.engine.submit(generate(i, prompt=PROMPT[:6], max_tokens=4))
    driver.engine.submit(generate(5, prompt=[9] * 64, max_tokens=1))
    ended: list[int] = []
    while driver.engine.busy:
        driver.engine.step()
        ended += [i for i, answer in driver.answers.items() if answer.ends and i not in ended]
        assert driver.engine.stats().rows + driver.engine.stats().prefilling <= 3
    assert ended == [2, 3, 4, 1, 5], "a second long one waits for the first"


def test_short_prompts_are_prefilled_together(llama: LoadedModel) -> None:
    driver = Driver(llama, prefill_step_size=64)
    for i in range(4):
        driver.engine.submit(generate(i, prompt=PROMPT[: 3 + i], max_tokens=3))
    driver.engine.step()
    assert driver.engine.stats().rows == 4


def test_a_full_queue_refuses_and_rows_are_limited(llama: LoadedModel) -> None:
    driver = Driver(llama, max_rows=2, max_queue=3)
    for i in range(4):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=4))
    assert driver.answers[3].rejected is not None
    assert (driver.answers[3].rejected.status, driver.answers[3].rejected.code) == (503, "queue_full")
    assert driver.most_rows() == 2
    assert [driver.answers[i].finish_reason for i in range(3)] == ["length"] * 3


def test_limits_change_in_place(llama: LoadedModel) -> None:
    driver = Driver(llama, max_rows=1, max_queue=1)
    driver.engine.configure(Configure(max_rows=3, max_queue=8, max_context=30, prefill_step_size=4))
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT))
    driver.engine.step()
    driver.drain()
    assert {answer.finish_reason for answer in driver.answers.values()} == {"length"}
    assert driver.answers[0].tokens == 30 - len(PROMPT)
    driver.engine.configure(Configure(max_context=0))
    assert driver.engine.intake.context(driver.engine.limits) == 512, "the model's own"


def test_an_unknown_adapter_is_refused(llama: LoadedModel) -> None:
    answer = Driver(llama).one(prompt=PROMPT, adapter="nobody")
    assert answer.rejected is not None
    assert (answer.rejected.status, answer.rejected.param) == (404, "adapter_name")


def test_draining_refuses_new_requests_and_finishes_old_ones(llama: LoadedModel) -> None:
    driver = Driver(llama)
    driver.engine.submit(generate(1, prompt=PROMPT, max_tokens=5))
    driver.engine.intake.draining = True
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=5))
    driver.drain()
    assert driver.answers[1].finish_reason == "length"
    assert driver.answers[2].rejected is not None
    assert driver.answers[2].rejected.status == 503


def test_failing_all_ends_each_once(llama: LoadedModel) -> None:
    driver = Driver(llama, max_rows=1)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=50))
    driver.engine.step()
    driver.engine.step()
    driver.engine.fail_all("stopping")
    driver.drain()
    assert [(a.finish_reason, a.error, a.ends) for a in driver.answers.values()] == [("error", "stopping", 1)] * 3
    assert driver.engine.stats().failed_total == 3


def test_what_breaks_a_step_ends_its_rows_and_not_the_loop(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(llama, max_rows=2)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=6))
    driver.engine.step()
    calls = {"left": 1}
    healthy = driver.engine._batch._call._model

    def breaks_once(*args: Any, **kwargs: Any) -> Any:
        if calls["left"]:
            calls["left"] -= 1
            raise RuntimeError("no memory left")
        return healthy(*args, **kwargs)

    monkeypatch.setattr(driver.engine._batch._call, "_model", breaks_once)
    driver.drain()
    assert [driver.answers[i].finish_reason for i in range(3)] == ["error", "error", "length"]
    assert "no memory left" in driver.answers[0].error
    assert driver.answers[2].text == greedy_text(llama, 6)
    assert driver.engine.rows == []


def test_when_nothing_can_be_computed_any_more_all_requests_end_and_so_does_the_engine(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(llama, max_rows=2)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=6))
    driver.engine.step()

    class Lost:
        make_cache = llama.model.make_cache

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("device lost")

    monkeypatch.setattr(driver.engine._batch._call, "_model", Lost())
    monkeypatch.setattr(driver.engine, "_loaded", replace(llama, model=Lost()))
    with pytest.raises(EngineDied, match="device lost"):
        driver.engine.step()
    assert [driver.answers[i].finish_reason for i in range(3)] == ["error"] * 3


@pytest.mark.parametrize("together", [True, False])
def test_what_breaks_a_prefill_ends_its_rows_and_not_the_queue(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    driver = Driver(llama, prefill_step_size=64 if together else 8)
    healthy, calls = driver.engine._prefiller._traced._model, {"left": 1}

    def breaks_once(*args: Any, **kwargs: Any) -> Any:
        if calls["left"]:
            calls["left"] -= 1
            raise RuntimeError("no memory left")
        return healthy(*args, **kwargs)

    monkeypatch.setattr(driver.engine._prefiller._traced, "_model", breaks_once)
    for i in range(2):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=6))
    driver.drain()
    driver.run([generate(5, prompt=PROMPT, max_tokens=6)])
    assert driver.answers[0].finish_reason == "error"
    assert driver.answers[1].finish_reason == ("error" if together else "length")
    assert driver.answers[5].text == greedy_text(llama, 6)


def test_a_request_that_cannot_be_prepared_is_its_own_end(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(llama)

    def broken(request: Any, max_context: int) -> Any:
        raise OverflowError("a tokenizer's bug")

    with monkeypatch.context() as patch:
        patch.setattr(type(driver.engine.intake._admission), "row", lambda self, r, c: broken(r, c))
        driver.run([generate(1, prompt=PROMPT)])
    assert driver.answers[1].rejected is not None
    assert driver.answers[1].rejected.status == 500
    assert driver.one(prompt=PROMPT, max_tokens=3).finish_reason == "length"


def test_cancelled_rows_leave_before_the_next_step(llama: LoadedModel) -> None:
    driver = Driver(llama, max_rows=2)
    for i in range(3):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=50))
    for _ in range(4):
        driver.engine.step()
    driver.engine.cancel(0)
    driver.engine.cancel(2)
    driver.engine.cancel(99)
    said = driver.answers[0].text
    driver.engine.step()
    assert driver.engine.stats().rows == 1
    assert driver.engine.stats().waiting == 0
    driver.drain()
    assert driver.answers[0].text == said
    assert driver.answers[0].ends == 0
    assert 2 not in driver.answers
    assert driver.answers[1].text == greedy_text(llama, 50)
    assert driver.engine.stats().cancelled_total == 2


def test_a_prompt_is_cancelled_between_two_chunks(llama: LoadedModel) -> None:
    driver = Driver(llama, prefill_step_size=8)
    driver.engine.submit(generate(1, prompt=[9] * 200, max_tokens=5))
    driver.engine.step()
    assert driver.engine.stats().prefilling == 1
    driver.engine.cancel(1)
    driver.engine.step()
    assert not driver.engine.busy
    assert driver.answers == {}


def test_two_hundred_cancels_leave_nothing_behind(model_folder: ModelFolder, tmp_path: Path) -> None:
    loaded = load(model_folder("llama"))
    driver = Driver(loaded, max_rows=8, prefill_step_size=16, prefix_cache_bytes=100_000)
    adapter = write_mlx(tmp_path / "a", draw(linear_shapes(loaded, ATTENTION), 4, 1))
    driver.engine.load_adapter(AdapterSource("a", str(adapter)))
    dice = random.Random(0)
    pending: list[tuple[int, int]] = []
    memory = []
    submitted = step = 0
    while submitted < 200 or pending or driver.engine.busy:
        if submitted < 200 and dice.random() < 0.7:
            prompt = [dice.randrange(6, 300) for _ in range(dice.randrange(1, 60))]
            driver.engine.submit(generate(submitted, prompt=prompt, adapter=dice.choice(["", "a"]), max_tokens=60))
            pending.append((step + dice.randrange(20), submitted))
            submitted += 1
        for due in [entry for entry in pending if entry[0] <= step]:
            driver.engine.cancel(due[1])
            pending.remove(due)
        driver.engine.step()
        if not driver.engine.busy:
            memory.append(active_memory())
        step += 1
    stats = driver.engine.stats()
    assert (stats.rows, stats.prefilling, stats.waiting, stats.cancelled_total) == (0, 0, 0, 200)
    assert all(answer.ends == 0 for answer in driver.answers.values())
    driver.engine.configure(Configure(prefix_cache_bytes=0))
    driver.engine.drop_adapter("a")
    assert active_memory() <= min(memory)


def test_one_step_frame_a_step(llama: LoadedModel) -> None:
    driver = Driver(llama)
    for i in range(5):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=4))
    frames = []
    while driver.engine.busy:
        before = len(driver.frames)
        driver.engine.step()
        frames.append(len(driver.frames) - before)
    assert max(frames) == 1
    assert sum(len(frame.deltas) for frame in driver.frames if isinstance(frame, Step)) == 20


def test_first_tokens_come_with_the_first_step_of_a_batch_and_later_ones_while_the_next_is_computed(
    llama: LoadedModel,
) -> None:
    driver = Driver(llama)
    for i in range(2):
        driver.engine.submit(generate(i, prompt=PROMPT, max_tokens=20))
    said = []
    for _ in range(3):
        driver.engine.step()
        said.append([driver.answers[i].tokens for i in range(2)])
    assert said == [[1, 1], [1, 1], [2, 2]], "one step of those that follow is always under way"
    driver.engine.submit(generate(2, prompt=PROMPT, max_tokens=20))
    said = []
    while 2 not in driver.answers:
        driver.engine.step()
        said.append(driver.answers[0].tokens)
    assert said == [*range(3, 3 + len(said))], "who joins others does not hold them up"
    driver.drain()
    assert [driver.one(prompt=PROMPT, max_tokens=1).tokens for _ in range(2)] == [1, 1]


def test_a_trial_leaves_no_trace(llama: LoadedModel) -> None:
    driver = Driver(llama, prefix_cache_bytes=1 << 20)
    assert driver.engine.trial(generate(-1, prompt=[0, 0], max_tokens=1)) is None
    assert driver.engine.trial(*startup._SOME) is None
    assert "token 99999" in (driver.engine.trial(generate(-1, prompt=[99_999])) or "")
    assert driver.frames == []
    stats = driver.engine.stats()
    assert (stats.completion_tokens_total, stats.steps_total, stats.prefix_cache_bytes) == (0, 0, 0)


def test_the_first_delta_and_the_last_have_usage(llama: LoadedModel) -> None:
    frames: list[FromEngine] = []
    engine = Engine(llama, Limits(), frames.append)
    engine.submit(Generate(id=1, prompt=PROMPT, max_tokens=3))
    while engine.busy:
        engine.step()
    deltas = [delta for frame in frames if isinstance(frame, Step) for delta in frame.deltas]
    assert [delta.usage for delta in deltas] == [Usage(len(PROMPT), 1), None, Usage(len(PROMPT), 3)]


def test_a_request_that_only_counts_is_answered_at_once(llama: LoadedModel) -> None:
    frames: list[FromEngine] = []
    engine = Engine(llama, Limits(), frames.append)
    engine.submit(Generate(id=4, prompt=PROMPT, count_only=True))
    assert not engine.busy
    assert frames == [Step([Delta(4, "", 0, "stop", Usage(len(PROMPT), 0))])]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-7])
def test_the_coldest_answer_is_the_greedy_one(llama: LoadedModel, temperature: float) -> None:
    """A float32 of 1e-45 is nothing, and logits over it are no numbers."""
    answer = Driver(llama).one(prompt=PROMPT, max_tokens=6, temperature=temperature, seed=1)
    assert answer.text == greedy_text(llama, 6)
