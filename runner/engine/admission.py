"""A request to a row: checked against the model, rendered and tokenised. Nothing of MLX happens here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from runner.engine.chat import ChatTemplate
from runner.engine.row import Row
from runner.engine.stops import StopStrings
from runner.engine.tokenizer import Tokenizer
from runner.errors import InvalidRequest
from runner.protocol import Generate, Sampling


@dataclass(frozen=True, slots=True)
class Admission:
    """Makes rows of requests for one model. `vocabulary` is the width of its logits."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    vocabulary: int

    def row(self, request: Generate, max_context: int) -> Row:
        """The row for `request`, without its adapter. `max_context` is in tokens, 0 for no limit.

        Raises InvalidRequest, naming the field.
        """
        self._check_sampling(request.sampling)
        prompt = self._prompt(request)
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
        return Row(
            id=request.id,
            prompt=prompt,
            sampling=request.sampling,
            seed=int.from_bytes(os.urandom(8)) if seed is None else seed,
            max_tokens=min(request.max_tokens or room, room),
            eos_ids=self.tokenizer.eos_ids,
            detokenizer=self.tokenizer.detokenizer(),
            stops=StopStrings(request.stop),
        )

    def _prompt(self, request: Generate) -> list[int]:
        if (request.messages is None) == (request.prompt is None):
            raise InvalidRequest("give either messages or prompt", param="messages")
        if request.messages is not None:
            return self.tokenizer.encode_rendered(self.chat.prompt(request.messages, request.chat_template_kwargs))
        if isinstance(request.prompt, str):
            return self.tokenizer.encode_prompt(request.prompt)
        assert request.prompt is not None
        for token in request.prompt:
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(
                    f"prompt: token {token} is not one of the model's {self.vocabulary}", param="prompt"
                )
        return request.prompt

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
