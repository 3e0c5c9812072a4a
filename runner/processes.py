"""How our own processes are started."""

from __future__ import annotations

import sys


def python_module(name: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules.

    With -P, so that a file in the user's folder that happens to be called yaml.py is not taken for the library.
    """
    return [sys.executable, "-P", "-m", name, *arguments]
