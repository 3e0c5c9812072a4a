"""A request that has been read (rendered, tokenised), before the engine has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from runner.protocol import Delta, Generate

if TYPE_CHECKING:
    from runner.engine.row import Row  # which imports MLX; the process looks for requests before that is there


class Prepared(msgspec.Struct, frozen=True):
    """What was `found`: a row without its adapter, the count that was asked for, or what the reading ended with."""

    request: Generate
    found: Row | Delta | Exception

    @property
    def id(self) -> int:
        """The request's."""
        return self.request.id
