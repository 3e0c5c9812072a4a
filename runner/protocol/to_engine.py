"""What the runner says to an engine."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from runner.protocol.spec import AdapterSource


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next token. Names and meanings are mlx-lm's and OpenAI's.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and penalties at their neutral value are off.
    `repetition_penalty`, `presence_penalty` and `frequency_penalty` look at the last `repetition_context_size` tokens
    for the first, at the generated tokens for the other two (as OpenAI documents them).
    `logprobs` is the number of alternatives per token (0: only the chosen one's), None for no logprobs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None


class Grammar(msgspec.Struct, frozen=True):
    """What the text of an answer has to match.

    `source` is a JSON Schema (`json`), a regular expression for the whole text (`regex`), a grammar in llguidance's
    Lark dialect (`lark`), or a JSON list of the strings to choose from (`choice`). `param` is the request's field that
    it stands in, for refusals to name.
    """

    kind: Literal["json", "regex", "lark", "choice"]
    source: str
    param: str


class Generate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Generate one completion. Exactly one of `messages` (rendered by the chat template) and `prompt` is given.

    `prompt` is text or token ids. `adapter` is a key, "" for the base model. `stop` strings are not part of the text
    that comes back. `max_tokens` 0 means as many as the context has room for. With a `grammar`, the answer ends where
    the grammar does.

    `tools` (in OpenAI's shape) are shown to the model by its template, and its calls come back as calls; None means
    that text which looks like a call is text. Without `parallel_tool_calls` the first call ends the answer. Of the
    tools named in `must_call` one has to be called.

    With `continue_final` the last message, the assistant's, is the beginning of the answer. With `count_only` nothing
    is generated: one delta comes back, whose usage has the prompt's tokens.
    """

    id: int
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    adapter: str = ""
    max_tokens: int = 0
    stop: list[str] = []
    sampling: Sampling = Sampling()
    grammar: Grammar | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    must_call: list[str] = []
    parallel_tool_calls: bool = True
    continue_final: bool = False
    count_only: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Drop the row. No more is sent for `id`, and it is not an error if it has ended already."""

    id: int


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Make an adapter resident; answered with AdapterLoaded or AdapterRefused."""

    adapter: AdapterSource


class DropAdapter(msgspec.Struct, frozen=True, tag="drop_adapter"):
    """Take no new rows for `key`, and free it when the last row that uses it has ended; answered with AdapterDropped
    at once. Unknown keys are answered alike."""

    key: str


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """Change limits in place. None leaves a limit as it is."""

    max_rows: int | None = None
    max_queue: int | None = None
    prefill_step_size: int | None = None
    max_context: int | None = None
    prefix_cache_bytes: int | None = None
    num_draft_tokens: int | None = None
    memory_limit_bytes: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish the running rows for at most `deadline` seconds, fail what is left, then exit 0."""

    deadline: float = 0.0


ToEngine = Generate | Cancel | LoadAdapter | DropAdapter | Configure | Shutdown
