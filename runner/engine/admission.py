"""A request to a row: checked against the model, rendered and tokenised.

Nothing of MLX happens here, and nothing changes but what is found once and kept (the ids of markers): any thread may
have a row made, while others do (`reading.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

import msgspec
from msgspec import structs

from runner.engine.answer.conventions import Conventions
from runner.engine.answer.forced import Tool, Writer, tool_writer
from runner.engine.answer.parser import parser_for
from runner.engine.chat import ChatTemplate
from runner.engine.grammar.preface import preface_of
from runner.engine.grammar.schema import passed_over
from runner.engine.prepared import Prepared
from runner.engine.row import Row
from runner.engine.stops import StopStrings
from runner.engine.tokenizer import Tokenizer
from runner.errors import InvalidRequest
from runner.protocol import Delta, Generate, Grammar, Sampling, Usage

_MOST_REPETITIONS: Final = 1 << 17
"""Tokens that a repetition penalty looks back on at most, whatever the request says: for models without a limit."""

_COLDEST: Final = 1e-6
"""Temperature below which a row is greedy."""

_LONG_TEXT: Final = 1 << 20
"""Characters of a text that is read whole in any case: half a second's work."""


class Admission(msgspec.Struct, frozen=True, dict=True):
    """Makes rows of requests for one model. `vocabulary` is the width of its logits."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    vocabulary: int
    conventions: Conventions = msgspec.field(default_factory=Conventions)

    @cached_property
    def _markers(self) -> dict[int, str]:
        return self.tokenizer.special_ids(self.conventions.markers)

    @cached_property
    def _writer(self) -> Writer:
        return tool_writer(self.conventions, self._markers, self.chat.source)

    def prepared(self, request: Generate, max_context: int) -> Prepared:
        """`request`, read: with its row, its count, or what was wrong with it. `max_context` as below."""
        try:
            read = self.counted if request.count_only else self.row
            return Prepared(request, read(request, max_context))
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # noqa: BLE001 - whoever takes the request has to tell of it
            return Prepared(request, error)
        except BaseException as panic:  # noqa: BLE001 - as one of the tokenizer's is, which is no Exception
            failure = RuntimeError(f"{type(panic).__name__}: {panic}")
            failure.__cause__ = panic
            return Prepared(request, failure)

    def row(self, request: Generate, max_context: int) -> Row:
        """The row for `request`, without its adapter. `max_context` is in tokens, 0 for no limit.

        Raises InvalidRequest, naming the field.
        """
        self._check_sampling(request.sampling)
        text, prompt = self._prompt(request, max_context)
        parser = preface = None
        if request.messages is not None:
            parser = parser_for(self.conventions, request.tools, text)
            if request.grammar is not None and not request.must_call:
                preface = preface_of(self.conventions, self.tokenizer, text, tools=bool(request.tools))
        field = "messages" if request.prompt is None else "prompt"
        if not prompt:
            raise InvalidRequest(f"{field} has no tokens", param=field)
        room = max_context - len(prompt) if max_context else 1 << 62
        if room <= 0:
            raise InvalidRequest(
                f"{field} has {len(prompt)} tokens, and the model's context holds {max_context}, the answer included",
                param=field,
                code="context_length_exceeded",
            )
        seed = request.sampling.seed
        max_tokens = min(request.max_tokens or room, room)
        return Row(
            id=request.id,
            prompt=prompt,
            sampling=_computable(request.sampling, len(prompt) + max_tokens),
            seed=int.from_bytes(os.urandom(8)) if seed is None else seed,
            max_tokens=max_tokens,
            eos_ids=self.tokenizer.eos_ids,
            detokenizer=self.tokenizer.detokenizer(None if parser is None else self._markers),
            stops=StopStrings(request.stop),
            parser=parser,
            preface=preface,
            open_ended=not request.max_tokens,
            one_call=not request.parallel_tool_calls,
            asked=self._grammar(request, text),
        )

    def _grammar(self, request: Generate, prompt: str) -> Grammar | None:
        """What the text has to match: its tools, if one has to be called, else the form that the request asks for."""
        if not request.tools or (request.grammar is not None and not request.must_call):
            return request.grammar
        tools = [Tool.of(tool) for tool in request.tools]
        for index, tool in enumerate(tools):
            if tool.strict and (reason := passed_over(tool.schema)) is not None:
                param = f"tools[{index}].function.parameters"
                raise InvalidRequest(f"`{param}`: {reason}", param=param, code="invalid_grammar")
        several = request.parallel_tool_calls
        if not request.must_call:
            return self._writer.strict(tools, prompt, several=several)
        return self._writer.forced([tool for tool in tools if tool.name in request.must_call], prompt, several=several)

    def counted(self, request: Generate, max_context: int) -> Delta:
        """The only delta of a request that is not generated: its usage has the prompt's tokens. `max_context` as above.

        Raises InvalidRequest.
        """
        _, prompt = self._prompt(request, max_context)
        return Delta(request.id, "", 0, "stop", Usage(len(prompt), 0))

    def _prompt(self, request: Generate, max_context: int) -> tuple[str, list[int]]:
        """The prompt's text, as far as it is text, and its tokens."""
        if (request.messages is None) == (request.prompt is None):
            raise InvalidRequest("give either messages or prompt", param="messages")
        if request.messages is not None:
            if max_context and len(request.messages) > max_context:  # to render half a million takes ten seconds
                raise InvalidRequest(
                    f"there are {len(request.messages)} messages, more than the {max_context} tokens that the model's "
                    "context holds",
                    param="messages",
                    code="context_length_exceeded",
                )
            rendered = self.chat.prompt(
                request.messages, self._variables(request), continue_final=request.continue_final
            )
            return rendered, _encoded(self.tokenizer.encode_rendered, rendered, max_context, "messages")
        if isinstance(request.prompt, str):
            return request.prompt, _encoded(self.tokenizer.encode_prompt, request.prompt, max_context, "prompt")
        assert request.prompt is not None
        for token in (min(request.prompt, default=0), max(request.prompt, default=0)):
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(
                    f"prompt: token {token} is not one of the model's {self.vocabulary}", param="prompt"
                )
        return "", request.prompt

    def _variables(self, request: Generate) -> dict[str, Any]:
        if not request.tools:
            return request.chat_template_kwargs
        if self.chat.source and "tools" not in self.chat.source:
            raise InvalidRequest(
                "this model's chat template has no place for tools; use a model that was trained to call them",
                param="tools",
                code="tools_not_supported",
            )
        if not self.conventions.harmony and self.conventions.tools is None:
            raise InvalidRequest(
                "how this model writes tool calls cannot be told from its chat template; "
                "name one with tool_parser in the manifest",
                param="tools",
                code="tools_not_supported",
            )
        return {**request.chat_template_kwargs, "tools": request.tools}

    def _check_sampling(self, sampling: Sampling) -> None:
        for token in sampling.logit_bias:
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(
                    f"logit_bias: token {token} is not one of the model's {self.vocabulary}", param="logit_bias"
                )
        if sampling.repetition_penalty <= 0:
            raise InvalidRequest("repetition_penalty should be greater than 0", param="repetition_penalty")
        if sampling.temperature < 0:
            raise InvalidRequest("temperature should be 0 or greater", param="temperature")
        if sampling.seed is not None and not -(1 << 63) <= sampling.seed < 1 << 64:
            raise InvalidRequest("seed should fit 64 bits", param="seed")


def _encoded(encode: Callable[[str], list[int]], text: str, max_context: int, field: str) -> list[int]:
    """The tokens of a text. Of one that is far too long only the beginning is looked at: every row waits meanwhile.

    Raises InvalidRequest.
    """
    beginning = max(_LONG_TEXT, 16 * max_context)
    if max_context and len(text) > beginning and len(encode(text[:beginning])) > max_context:
        raise InvalidRequest(
            f"{field} has {len(text)} characters, whose first {beginning} are more tokens than the {max_context} that "
            "the model's context holds",
            param=field,
            code="context_length_exceeded",
        )
    return encode(text)


def _computable(sampling: Sampling, length: int) -> Sampling:
    """The same for a row of at most `length` tokens, in numbers that arrays can have.

    The batch holds the window for repetitions, for each row: it is no wider than the row gets long. And logits over the
    coldest temperatures are no float32 any more: what comes of them is the likeliest token.
    """
    size = min(sampling.repetition_context_size, length, _MOST_REPETITIONS)
    temperature = sampling.temperature if sampling.temperature >= _COLDEST else 0.0
    if (size, temperature) == (sampling.repetition_context_size, sampling.temperature):
        return sampling
    return structs.replace(sampling, repetition_context_size=size, temperature=temperature)
