"""What may come before the text that a grammar is for: reasoning, or a tool call in its place.

A model that thinks has been taught to do so before it answers, and one that is shown tools may call one instead. The
grammar is for the answer. So until that begins, whatever leads to it is allowed; and where it begins, so are the
tokens that open something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from runner.engine.answer.conventions import Conventions
from runner.engine.tokenizer import Tokenizer

Stage = Literal["before", "start", "within", "elsewhere"]
"""Where a row is: before its answer, where the answer begins, within it, or somewhere that no grammar is for."""


class Preface(msgspec.Struct, frozen=True):
    """A model's conventions as token ids, and how far a row has come in them.

    `close` ends what comes before an answer, once it is `armed`: `channel` disarms it, and `final` arms it again.
    `opens` begins more to come before, `calls` a tool call. `layout` may stand once between a `close` and the answer.
    `ends` end the text, and are not allowed before there is an answer, unless there `may_call` a tool.
    """

    stage: Stage
    ends: frozenset[int]
    close: int | None = None
    opens: int | None = None
    calls: int | None = None
    layout: frozenset[int] = frozenset()
    may_call: bool = False
    channel: int | None = None
    final: int | None = None
    armed: bool = True
    closed: bool = False

    def after(self, token: int) -> Preface:
        """Once the row has said `token`."""
        match self.stage:
            case "before":
                return self._after_reasoning(token)
            case "start":
                return self._after_start(token)
            case _:
                return self

    @property
    def beside(self) -> frozenset[int]:
        """At the start, what is allowed beside what the grammar allows."""
        others = frozenset(token for token in (self.opens, self.calls) if token is not None)
        return others | self.layout if self.closed else others

    def _after_reasoning(self, token: int) -> Preface:
        if token == self.close and self.armed:
            return msgspec.structs.replace(self, stage="start", opens=None, closed=True)
        if token == self.channel:
            return msgspec.structs.replace(self, armed=False)
        if token == self.final:
            return msgspec.structs.replace(self, armed=True)
        return self

    def _after_start(self, token: int) -> Preface:
        if token == self.opens:
            return msgspec.structs.replace(self, stage="before")
        if token == self.calls:
            return msgspec.structs.replace(self, stage="elsewhere")
        if self.closed and token in self.layout:
            return msgspec.structs.replace(self, layout=frozenset())
        return msgspec.structs.replace(self, stage="within")


def preface_of(conventions: Conventions, tokenizer: Tokenizer, prompt: str, *, tools: bool) -> Preface | None:
    """What may come before the answer to the rendered `prompt`; None where the answer is all there is.

    `tools` says whether the model is shown any. A marker that is not one token is not known here.
    """
    single = _single(tokenizer)
    ends = tokenizer.eos_ids
    if conventions.harmony:
        message, channel, final = (single(text) for text in ("<|message|>", "<|channel|>", "final"))
        if message is None or channel is None or final is None:
            return None
        return Preface("before", ends, message, may_call=tools, channel=channel, final=final, armed=False)
    calls = single(conventions.tools.start) if tools and conventions.tools is not None else None
    think = conventions.think
    close = None if think is None else single(think[1])
    if think is None or close is None:
        return None if calls is None else Preface("start", ends, calls=calls)
    layout = frozenset(token for text in ("\n", "\n\n") if (token := single(text)) is not None)
    preface = Preface("start", ends, close, single(think[0]), calls, layout)
    said = prompt.rstrip()
    if said.endswith(think[0]):
        return msgspec.structs.replace(preface, stage="before", opens=None)
    return msgspec.structs.replace(preface, opens=None) if said.endswith(think[1]) else preface


def _single(tokenizer: Tokenizer) -> Callable[[str], int | None]:
    def find(text: str) -> int | None:
        if tokenizer.backend is not None and (token := tokenizer.backend.token_to_id(text)) is not None:
            return int(token)
        ids = tokenizer.encode_rendered(text)
        return ids[0] if len(ids) == 1 else None

    return find
