"""What plain scalars mean, by the core schema of YAML 1.2 (section 10.3.2).

PyYAML follows YAML 1.1, where `on` is true, `010` is 8 and `1:30` is 90; editors, JSON schemas and people read 1.2.
"""

from __future__ import annotations

import math
import re
from typing import Final

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT: Final = r"[-+]?[0-9]{1,19}"
_BASED: Final = r"0(?:o[0-7]{1,21}|x[0-9a-fA-F]{1,15})"
_FLOAT: Final = r"[-+]?(?:\.[0-9]{1,400}|[0-9]{1,400}(?:\.[0-9]{0,400})?)(?:[eE][-+]?[0-9]{1,4})?"
_INFINITY: Final = r"([-+]?)\.(?:inf|Inf|INF)"
_NAN: Final = frozenset({".nan", ".NaN", ".NAN"})

Scalar = str | int | float | bool | None


def read_scalar(text: str) -> Scalar:
    """The value of a plain scalar; what is nothing else is text."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if text[0] not in "0123456789.+-":
        return text
    if re.fullmatch(_INT, text):
        number = int(text)
        return number if -(2**63) <= number < 2**63 else float(number)  # 64 bits go into messages; the rest is a float
    if re.fullmatch(_BASED, text):
        return int(text, 0)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    if match := re.fullmatch(_INFINITY, text):
        return -math.inf if match[1] == "-" else math.inf
    return math.nan if text in _NAN else text
