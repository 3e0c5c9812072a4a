"""The registry of diagnostic codes: what each means, with an example of what is wrong and of what is right.

The texts are in `codes.toml`. Nothing reads them but `mlx-run explain` and SARIF, so a manifest that is only loaded
pays for none of it.

=====  ==========================================
E1xx   the file and its YAML
E2xx   shape: keys, kinds of values, ranges
E3xx   references between parts
E5xx   variables, secrets and access
E6xx   sources and folders
E7xx   memory
E8xx   downloads and the lock file
Wnnn   warnings, in the same groups
=====  ==========================================
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

GROUPS: Final = {
    "1": "the file and its YAML",
    "2": "shape",
    "3": "references between parts",
    "5": "variables, secrets and access",
    "6": "sources and folders",
    "7": "memory",
    "8": "downloads and the lock file",
}
"""The first digit of a code → what it is about."""

_SECTIONS: Final = {
    "name": "name: dev\n",
    "servers": "servers: {main: {port: 8080}}\n",
    "models": "models: {chat: {source: ./chat}}\n",
}


class Code(NamedTuple):
    """One code. `wrong` and `right` are YAML, and empty where no text can show it (a file that is not there).

    They are a part of a manifest (`completed` gives the rest), or all of it where `whole` is true.
    """

    code: str
    title: str
    explanation: str
    wrong: str = ""
    right: str = ""
    whole: bool = False

    @property
    def severity(self) -> Literal["error", "warning"]:
        """Of the diagnostics with this code."""
        return "warning" if self.code.startswith("W") else "error"

    @property
    def group(self) -> str:
        """What this code and its neighbours are about."""
        return GROUPS[self.code[1]]

    def completed(self, example: str) -> str:
        """`wrong` or `right` as a whole manifest."""
        if self.whole:
            return example
        given = {line.partition(":")[0] for line in example.splitlines()}
        return "".join(text for section, text in _SECTIONS.items() if section not in given) + example


@cache
def registry() -> Mapping[str, Code]:
    """Every code, in order."""
    text = Path(__file__).with_name("codes.toml").read_text(encoding="utf-8")
    return {code: Code(code, **entry) for code, entry in tomllib.loads(text).items()}
