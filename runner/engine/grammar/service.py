"""Grammars of rows: compiled beside the engine's thread, kept, and copied for each row.

A row whose grammar is not known yet waits here, not in the queue, and nothing else waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from runner.engine.grammar.matcher import RowGrammar
from runner.engine.row import Row
from runner.engine.tokenizer import Tokenizer
from runner.errors import EngineFailed, InvalidRequest, RequestError
from runner.protocol import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from runner.engine.grammar.compiler import GrammarCompiler

logger = logging.getLogger(__name__)

MAX_SOURCE: Final = 256 * 1024
"""Bytes of one grammar, as UTF-8."""

_KEPT: Final = 64
"""Compiled grammars, and refusals, that are remembered."""

_IDLE: Final = 30.0
"""Seconds without a grammar after which the compiling thread, and its child process, end."""


Looked = tuple[Row, RequestError | None]
"""A row whose grammar has been looked at: it has its own copy, unless it is refused."""


class Grammars:
    """Every method is for the engine's thread."""

    def __init__(self, tokenizer: Tokenizer, width: int, wake: Callable[[], None]) -> None:
        """`width` is that of the model's logits. `wake` is called by another thread when `take` has something new."""
        self._tokenizer = tokenizer
        self._width = width
        self._wake = wake
        self._known: OrderedDict[Grammar, LLMatcher | RequestError] = OrderedDict()
        self._waiting: list[tuple[Row, Grammar]] = []
        self._asked: SimpleQueue[Grammar] = SimpleQueue()
        self._answered: SimpleQueue[tuple[Grammar, LLMatcher | RequestError]] = SimpleQueue()
        self._lock = threading.Lock()
        self._running = False

    @property
    def rows(self) -> list[Row]:
        """Rows that wait for their grammar."""
        return [row for row, _ in self._waiting]

    @property
    def ready(self) -> bool:
        """Whether `take` has something."""
        return not self._answered.empty()

    def give(self, row: Row, grammar: Grammar) -> bool:
        """Give `row` its grammar. False: it is being compiled, and the row comes back through `take`.

        Raises RequestError: the grammar is refused, and the error names its field.
        """
        if len(grammar.source.encode()) > MAX_SOURCE:
            raise InvalidRequest(
                f"`{grammar.param}` is over the limit of {MAX_SOURCE >> 10} KiB", param=grammar.param, code="too_large"
            )
        if (known := self._known.get(grammar)) is not None:
            self._known.move_to_end(grammar)
            if isinstance(known, RequestError):
                raise known.with_traceback(None)
            row.grammar = RowGrammar(known.deep_copy(), row.preface)
            return True
        asked = any(other == grammar for _, other in self._waiting)
        self._waiting.append((row, grammar))
        if not asked:
            self._ask(grammar)
        return False

    def take(self) -> list[Looked]:
        """Rows that need not wait any longer, each grammar's in the order in which they came."""
        taken: list[Looked] = []
        while self.ready:
            grammar, found = self._answered.get()
            rows = [row for row, asked in self._waiting if asked == grammar]
            self._waiting = [(row, asked) for row, asked in self._waiting if asked != grammar]
            if isinstance(found, RequestError):
                taken += [(row, found) for row in rows]
            else:
                for row in rows:
                    row.grammar = RowGrammar(found.deep_copy(), row.preface)
                    taken.append((row, None))
            if not isinstance(found, EngineFailed):  # which another time may not happen
                self._keep(grammar, found)
        return taken

    def _keep(self, grammar: Grammar, found: LLMatcher | RequestError) -> None:
        self._known[grammar] = found
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)

    def remove_ended(self) -> list[Row]:
        """Forget the rows that are done, and return them."""
        ended = [row for row, _ in self._waiting if row.done]
        if ended:
            self._waiting = [(row, grammar) for row, grammar in self._waiting if not row.done]
        return ended

    def _ask(self, grammar: Grammar) -> None:
        with self._lock:
            self._asked.put(grammar)
            if not self._running:
                self._running = True
                threading.Thread(target=self._compile_all, name="grammars", daemon=True).start()

    # ------------------------------------------------------------- the compiling thread

    def _compile_all(self) -> None:
        compiler: GrammarCompiler | None = None
        try:
            while (grammar := self._next()) is not None:
                if compiler is None:
                    # Imported here: llguidance takes 60 ms that only a request with a grammar pays.
                    from runner.engine.grammar.compiler import GrammarCompiler  # noqa: PLC0415

                    compiler = GrammarCompiler(self._tokenizer, self._width)
                self._answered.put((grammar, _compile(compiler, grammar)))
                self._wake()
        finally:
            if compiler is not None:
                compiler.close()

    def _next(self) -> Grammar | None:
        try:
            return self._asked.get(timeout=_IDLE)
        except Empty:
            with self._lock:
                # Whoever asks from now on starts another thread.
                self._running = not self._asked.empty()
                return self._asked.get_nowait() if self._running else None


def _compile(compiler: GrammarCompiler, grammar: Grammar) -> LLMatcher | RequestError:
    try:
        return compiler.compile(grammar)
    except RequestError as refusal:
        return refusal
    except Exception as error:
        # Whatever one grammar trips over is the end of the requests that have it, not of this thread.
        logger.exception("grammar could not be compiled")
        return EngineFailed(f"`{grammar.param}` could not be compiled: {error}", param=grammar.param)
