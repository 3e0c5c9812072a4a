"""Upstream's model and cache modules without upstream's package initialiser.

`import mlx_lm` runs its `__init__`, which imports transformers: 1.2 s and 77 MB. The engine needs only
`mlx_lm.models.*`, so it registers a bare package under that name, with the same search path, before anything imports
from it. Submodules import as usual after that; `mlx_lm.utils` (and with it transformers) still can, where the full
loader is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def install_bare_package() -> None:
    """Make `mlx_lm` a package without its initialiser, unless it is already imported."""
    if "mlx_lm" in sys.modules:
        return
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.submodule_search_locations is None:
        return  # the first import of it says so
    package = ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["mlx_lm"] = package
