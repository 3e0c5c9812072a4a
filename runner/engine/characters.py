"""Text that can be encoded."""

from __future__ import annotations

import re
from typing import Final

_HALF: Final = re.compile("[\ud800-\udfff]")


def whole_characters(text: str) -> str:
    """Each half of a character (a lone surrogate) is U+FFFD.

    JSON can escape one (`\\ud83d`), and Python reads it; no message can carry it, and no tokenizer takes it.
    """
    return text if text.isascii() else _HALF.sub("\ufffd", text)
