"""A grammar is for the answer: what models say before one, or in its place, is theirs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from runner.engine.answer.conventions import Conventions, ToolConvention
from runner.engine.chat import ChatTemplate, jinja_render
from runner.engine.grammar.masks import GrammarMasks
from runner.engine.grammar.matcher import RowGrammar
from runner.engine.grammar.preface import Preface, preface_of
from runner.engine.loader import LoadedModel
from runner.protocol import Grammar
from tests.engine.drive import Answer, Driver
from tests.engine.grammar.matchers import END, WIDTH, allowed_by, kept, regex
from tests.engine.grammar.tokenizers import wrapped
from tests.engine.tiny import backend, encode

# The tiny tokenizer's special tokens play the markers.
OPEN, CLOSE, CALL = (backend().token_to_id(text) for text in ("<|system|>", "<|user|>", "<|pad|>"))
THINKS = Conventions(think=("<|system|>", "<|user|>"))
CALLS = ToolConvention("test", "<|pad|>", "", lambda text, _: {"name": text, "arguments": {}})
ENDS = frozenset({END})
NEWLINE, A = encode("\n")[0], encode("a")[0]
EVERYTHING = set(range(WIDTH))


def preface(prompt: str = "", conventions: Conventions = THINKS, *, tools: bool = False) -> Preface | None:
    return preface_of(conventions, wrapped(backend(), "<|end|>"), prompt, tools=tools)


def stages(found: Preface | None, *tokens: int) -> list[str]:
    """Where a row is at first, and after each token."""
    assert found is not None
    said: list[str] = [found.stage]
    for token in tokens:
        found = found.after(token)
        said.append(found.stage)
    return said


def test_a_model_that_may_think_first() -> None:
    assert stages(preface("hi"), A) == ["start", "within"]
    assert stages(preface("hi"), OPEN, A, CLOSE, A) == ["start", "before", "before", "start", "within"]
    assert stages(preface("hi"), OPEN, CLOSE, NEWLINE, NEWLINE) == ["start", "before", "start", "start", "within"]
    assert stages(preface("hi"), NEWLINE) == ["start", "within"], "layout comes after a marker"


def test_a_prompt_that_has_begun_to_think() -> None:
    assert stages(preface("hi<|system|>\n"), A, CLOSE, OPEN) == ["before", "before", "start", "within"]


def test_a_prompt_that_has_thought_or_was_told_not_to() -> None:
    found = preface("hi<|system|>\n\n<|user|>\n\n")
    assert found is not None
    assert found.beside == frozenset()


def test_a_call_in_place_of_the_answer() -> None:
    both = replace(THINKS, tools=CALLS)
    assert stages(preface("hi", both, tools=True), CALL, A, END) == ["start", "elsewhere", "elsewhere", "elsewhere"]
    assert stages(preface("hi", both, tools=True), OPEN, CLOSE, CALL) == ["start", "before", "start", "elsewhere"]
    assert stages(preface("hi", both), CALL) == ["start", "within"], "it is not shown any tool"


def test_nothing_but_an_answer() -> None:
    assert preface("hi", Conventions()) is None
    assert preface("hi", Conventions(think=("<no>", "</no>"))) is None, "not tokens of this model"


def test_channels() -> None:
    message, channel, final = 1, 2, 3
    found = Preface("before", ENDS, message, channel=channel, final=final, armed=False)
    analysis = [channel, 9, message, 9, final, 9]
    assert set(stages(found, *analysis)) == {"before"}
    assert stages(found, *analysis, channel, final, message, 9)[-2:] == ["start", "within"]


def grammar_with(found: Preface) -> RowGrammar:
    grammar = regex("[0-9]+x")
    grammar.preface = found
    return grammar


def test_masks_before_at_and_within() -> None:
    found = preface("hi<|system|>")
    assert found is not None
    grammar, masks = grammar_with(found), GrammarMasks(WIDTH)

    def now() -> set[int]:
        mask = masks.next([grammar])
        assert mask is not None
        return kept(mask, 1)[0][0]

    assert now() == EVERYTHING - ENDS
    grammar.advance(A)
    assert now() == EVERYTHING - ENDS
    grammar.advance(CLOSE)
    assert now() == allowed_by(regex("[0-9]+x")) | {NEWLINE}
    grammar.advance(encode("1")[0])
    assert now() == allowed_by(regex("[0-9]+x", "1"))
    assert not grammar.ended
    grammar.advance(encode("x")[0])
    assert grammar.ended
    assert not grammar.error


def test_masks_of_a_row_that_calls() -> None:
    found = preface("hi", Conventions(tools=CALLS), tools=True)
    assert found is not None
    grammar, masks = grammar_with(found), GrammarMasks(WIDTH)
    mask = masks.next([grammar])
    assert mask is not None
    assert kept(mask, 1)[0][0] == allowed_by(regex("[0-9]+x")) | {CALL}
    grammar.advance(CALL)
    assert masks.next([grammar]) is None
    assert not grammar.ended


@pytest.mark.parametrize("neighbours", [0, 5])
def test_masks_of_drafted_tokens_across_the_marker(neighbours: int) -> None:
    found = preface("hi<|system|>")
    assert found is not None
    digit = encode("1")[0]
    drafted = [A, CLOSE, NEWLINE, digit, digit]
    rows = [(0, grammar_with(found), drafted)]
    rows += [(i, regex("[a-z]+"), [A]) for i in range(1, neighbours + 1)]
    mask = GrammarMasks(WIDTH).drafted(rows, 6)
    assert mask is not None
    masks = kept(mask, neighbours + 1, 6)
    start = allowed_by(regex("[0-9]+x"))
    begun = [allowed_by(regex("[0-9]+x", said)) for said in ("1", "11")]
    assert masks[0] == [EVERYTHING - ENDS, EVERYTHING - ENDS, start | {NEWLINE}, start, *begun]
    assert all(row[:2] == [allowed_by(regex("[a-z]+", said)) for said in ("", "a")] for row in masks[1:])
    assert rows[0][1].stage == "before", "nothing has changed"


# ------------------------------------------------------------------ through the loop


@pytest.fixture
def thinker(llama: LoadedModel) -> Driver:
    """A model whose template opens the reasoning."""
    template = "{{ messages[0].content }}<|system|>"
    chat = ChatTemplate(jinja_render(template, llama.tokenizer.special_tokens))
    return Driver(replace(llama, chat=chat, conventions=THINKS))


def ask(driver: Driver, **fields: object) -> Answer:
    messages = [{"role": "user", "content": "hello"}]
    return driver.one(messages=messages, grammar=Grammar("regex", "[0-9]{3}", "x"), **fields)


def test_the_answer_matches_whatever_was_thought(thinker: Driver) -> None:
    answer = ask(thinker, max_tokens=50, logit_bias={CLOSE: 100.0})
    assert answer.finish_reason == "stop"
    assert answer.text.isdecimal()
    assert len(answer.text) == 3


def test_no_end_before_there_is_an_answer(thinker: Driver) -> None:
    answer = ask(thinker, max_tokens=9, logit_bias={END: 100.0, CLOSE: -100.0})
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", 9, "length")
