"""A request's grammar to llguidance's compiled form, or to the reason why not.

Importing this imports llguidance (60 ms): only a request with a grammar pays for it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from runner.engine.grammar.matcher import shortened
from runner.engine.grammar.schema import passed_over
from runner.engine.grammar.trial import Trial
from runner.engine.grammar.vocabulary import NoGrammars, grammar_vocabulary
from runner.engine.tokenizer import Tokenizer
from runner.errors import InvalidRequest
from runner.protocol import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_JSON_DEFAULTS: Final[JsonCompileOptions] = {"whitespace_pattern": r" |\n( {0,40}|\t{0,10})"}
"""What may stand where JSON allows whitespace: a space, or a line break with indentation. Any more of it is a way for a
model to go on for ever without an answer."""

_JSON_OVERRIDES: Final[JsonCompileOptions] = {"lenient": False}
"""Nothing in a schema is passed over, whatever its `x-guidance` says."""

_TRIAL: Final = 5.0
"""Seconds. The largest schemas that people have take one."""

_NAMES: Final = {"json": "JSON Schema", "regex": "regular expression", "lark": "grammar", "choice": "list of choices"}


class GrammarCompiler:
    """Compiles for one model. Everything here may take long; one thread uses it, and that is not the engine's."""

    def __init__(self, tokenizer: Tokenizer, width: int, trial_seconds: float = _TRIAL) -> None:
        """`width` is that of the model's logits."""
        self._tokenizer = tokenizer
        self._width = width
        self._trial = Trial(trial_seconds)
        self._vocabulary: LLTokenizer | None = None
        self._limits = LLParserLimits(verbose_errors=False)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of the text, for rows to copy. Raises InvalidRequest, naming `grammar.param`."""
        try:
            source = _source(grammar)
            self._trial.start()  # the vocabulary takes as long as the child needs to begin
            vocabulary = self._known_vocabulary()
            self._trial.run(source)
            matcher = LLMatcher(vocabulary, source, log_level=0, limits=self._limits)
            _require_usable(matcher, grammar)
        except InvalidRequest as error:
            raise InvalidRequest(f"`{grammar.param}`: {error.message}", param=grammar.param, code=error.code) from None
        return matcher

    def close(self) -> None:
        """Let go of the child process."""
        self._trial.close()

    def _known_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                self._vocabulary = grammar_vocabulary(self._tokenizer, self._width)
            except NoGrammars as reason:
                raise InvalidRequest(str(reason), code="unsupported_by_model") from None
        return self._vocabulary


def _source(grammar: Grammar) -> str:
    """What llguidance takes. Raises InvalidRequest."""
    match grammar.kind:
        case "json":
            return _json_source(grammar.source)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)
        case "choice":
            choices: list[str] = json.loads(grammar.source)
            # One token of the grammar, however many there are: llguidance's parser follows 2,000 alternatives at most.
            return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _json_source(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not valid JSON: {error}", code="invalid_grammar") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("a JSON Schema is an object here", code="invalid_grammar")
    if (reason := passed_over(schema)) is not None:
        raise InvalidRequest(reason, code="invalid_grammar")
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=_JSON_DEFAULTS, overrides=_JSON_OVERRIDES)
    except ValueError as error:
        raise InvalidRequest(shortened(str(error)), code="invalid_grammar") from None


def _require_usable(matcher: LLMatcher, grammar: Grammar) -> None:
    name = _NAMES[grammar.kind]
    first = matcher.deep_copy()
    if not first.is_error():
        first.compute_bitmask()
    if first.is_error():
        reason = shortened(first.get_error())
        message = f"this {name} cannot be kept: {reason}"
        if reason.startswith("NoExtension"):
            message = f"no text satisfies this {name}"
        raise InvalidRequest(message, code="invalid_grammar")
