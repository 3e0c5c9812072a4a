"""How far one row has come in its grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from runner.engine.grammar.preface import Preface, Stage

if TYPE_CHECKING:
    from llguidance import LLMatcher

_NO_NUMBERS: Final = (
    "what the model has computed for this request is not numbers (its logits are infinite or NaN), so that none of the "
    "tokens that the grammar allows could be chosen: look at its weights, its adapter and the penalties asked for"
)

_LONGEST_REASON: Final = 400
"""Characters of llguidance's messages that are shown."""


class RowGrammar:
    """A row's own copy of a compiled grammar. Never shared between rows.

    `preface` is what may come before the text that the grammar is for, None where nothing may. `spent` is how many
    seconds its masks have taken beyond what is usual, and `refused` why it is not followed any further; the former is
    written by `runner.engine.grammar.masks`, the latter there and here.
    """

    __slots__ = ("matcher", "preface", "refused", "spent")

    def __init__(self, matcher: LLMatcher, preface: Preface | None = None) -> None:
        self.matcher = matcher
        self.preface = preface
        self.spent = 0.0
        self.refused = ""

    @property
    def stage(self) -> Stage:
        """Where the row is."""
        return "within" if self.preface is None else self.preface.stage

    def advance(self, token: int) -> None:
        """The row has said `token`."""
        if self.preface is not None:
            self.preface = self.preface.after(token)
        if self.stage == "within" and not self.matcher.try_consume_tokens([token]) and not self.matcher.is_error():
            # The mask has left this token out: what chose it compared no numbers.
            self.refused = _NO_NUMBERS

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: the text is complete, or there is an `error`."""
        return bool(self.refused) or (self.stage == "within" and self.matcher.is_stopped())

    @property
    def error(self) -> str:
        """Why the grammar cannot go on, "" while it can."""
        if self.refused:
            return self.refused
        if self.matcher.is_error():
            return f"the grammar cannot be followed any further: {shortened(self.matcher.get_error())}"
        dead_end = self.matcher.is_stopped() and not self.matcher.is_accepting()
        return "the grammar allows no next token" if dead_end else ""


def shortened(reason: str) -> str:
    """llguidance's message on one line, without the state that it appends."""
    line = " ".join(reason.partition("<state>")[0].replace("<non-verbose/>", "").split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
