"""Penalties over many steps and rows against the plain definition, and repetition against upstream."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_repetition_penalty

from runner.engine.penalties import History, Penalties
from runner.engine.sampling import SamplingRow
from runner.protocol import Sampling

VOCABULARY = 12

penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "repetition_context_size": st.sampled_from([0, 1, 3, 20]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4]),
    }
)
tokens = st.integers(0, VOCABULARY - 1)


def reference(logits: Any, s: Sampling, prompt: list[int], generated: list[int]) -> Any:
    """One row, one step."""
    out = logits.copy()
    if s.repetition_penalty != 1 and s.repetition_context_size:
        for token in set((prompt + generated)[-s.repetition_context_size :]):
            out[token] *= s.repetition_penalty if out[token] < 0 else 1 / s.repetition_penalty
    for token in set(generated):
        out[token] -= s.presence_penalty + s.frequency_penalty * generated.count(token)
    return out


@given(
    rows=st.lists(st.tuples(penalties, st.lists(tokens, min_size=1, max_size=6)), min_size=1, max_size=4),
    steps=st.lists(st.lists(tokens, min_size=4, max_size=4), min_size=4, max_size=7),
    rebuilt=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_equal_the_definition(rows: list[Any], steps: list[list[int]], rebuilt: int) -> None:
    """`rebuilt` is the step before which the arrays are made anew, as when another row joins."""
    settings_of = [Sampling(**fields) for fields, _ in rows]
    prompts = [prompt for _, prompt in rows]
    generated: list[list[int]] = [[] for _ in rows]
    applied: Penalties | None = None
    history: History | None = None
    fed = [prompt[-1] for prompt in prompts]
    for step, sampled in enumerate(steps):
        if step in (0, rebuilt):
            state = []
            for s, prompt, own in zip(settings_of, prompts, generated, strict=True):
                # The last of the model's own is fed in this step; the first step feeds the prompt's last.
                state.append(SamplingRow(s, 0, prompt, own[:-1], bool(own)))
            applied = Penalties.of(state, VOCABULARY)
            history = None if applied is None else applied.start
        logits = mx.random.normal((len(rows), VOCABULARY), key=mx.random.key(step))
        got = logits
        if applied is not None and history is not None:
            penalised, histories = applied(logits[:, None], mx.array(fed, dtype=mx.uint32)[:, None], history)
            got, history = penalised[:, 0], histories.after()
        for i, s in enumerate(settings_of):
            expected = reference(np.array(logits[i].tolist()), s, prompts[i], generated[i])
            np.testing.assert_allclose(np.array(got[i].tolist()), expected, atol=1e-5)
        fed = sampled[: len(rows)]
        for own, token in zip(generated, fed, strict=True):
            own.append(token)


@given(
    rows=st.lists(
        st.tuples(penalties, st.lists(tokens, min_size=1, max_size=6), st.booleans()), min_size=1, max_size=4
    ),
    rounds=st.lists(
        st.lists(st.tuples(st.lists(tokens, min_size=4, max_size=4), st.integers(0, 3)), min_size=4, max_size=4),
        min_size=1,
        max_size=3,
    ),
)
@settings(deadline=None, max_examples=60)
def test_several_tokens_at_once_equal_one_by_one(rows: list[Any], rounds: list[Any]) -> None:
    """Each round feeds every row four tokens, of which it keeps another number each time."""
    settings_of = [Sampling(**fields) for fields, _, _ in rows]
    prompts = [prompt for _, prompt, _ in rows]
    started = [begun for _, _, begun in rows]
    applied = Penalties.of([SamplingRow(Sampling(**s), 0, p, [], b) for s, p, b in rows], VOCABULARY)
    if applied is None:
        return
    history = applied.start
    said: list[list[int]] = [[] for _ in rows]
    for number, round_ in enumerate(rounds):
        fed = [tokens for tokens, _ in round_[: len(rows)]]
        if number == 0:
            fed = [t if b else [p[-1], *t[1:]] for t, p, b in zip(fed, prompts, started, strict=True)]
        logits = mx.random.normal((len(rows), 4, VOCABULARY), key=mx.random.key(number))
        got, histories = applied(logits, mx.array(fed, dtype=mx.uint32), history)
        for i, s in enumerate(settings_of):
            for j in range(4):
                own = said[i] + fed[i][: j + 1]
                if not started[i]:
                    own = own[1:]
                expected = reference(np.array(logits[i, j].tolist()), s, prompts[i], own)
                np.testing.assert_allclose(np.array(got[i, j].tolist()), expected, atol=1e-5)
        last = [kept for _, kept in round_[: len(rows)]]
        history = histories.after(mx.array(last))
        for own, tokens_fed, kept in zip(said, fed, last, strict=True):
            own += tokens_fed[: kept + 1]


def test_repetition_equals_upstream() -> None:
    context = [3, 1, 4, 1, 5, 9]
    logits = mx.random.normal((1, VOCABULARY))
    row = SamplingRow(Sampling(repetition_penalty=1.5, repetition_context_size=4), 0, context, [], False)
    applied = Penalties([row], VOCABULARY)
    ours = applied(logits[:, None], mx.array([[context[-1]]], dtype=mx.uint32), applied.start)[0][:, 0]
    upstream = make_repetition_penalty(1.5, 4)(mx.array(context), logits + 0)
    assert mx.allclose(ours, upstream, atol=1e-6)


def test_none_where_no_row_has_one() -> None:
    assert Penalties.of([SamplingRow(Sampling(temperature=1.0), 0, [1], [], False)], VOCABULARY) is None
