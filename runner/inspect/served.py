"""What the engine finds out of an architecture when it loads one, known beforehand.

It tries every model (`runner.engine.compatibility`): whether rows in a batch get what they would get alone, and whether
its attention takes a quantised KV cache. The lists are what it says of tiny models of mlx-lm 0.32's architectures
(tests/inspect/test_served.py).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Final

from runner.inspect.config import Config

_ALONE: Final = "bailing_moe_linear gemma2 gpt_bigcode jamba llama4 mamba olmo_hybrid"
_UNQUANTISED: Final = """
    afm7 bailing_hybrid bailing_moe_linear bailing_moe_v3 deepseek_v3 deepseek_v32 gemma2 gemma4 gemma4_text
    glm4_moe_lite glm_moe_dsa gpt_bigcode jamba kimi_k25 kimi_linear kimi_vl llama4 longcat_flash mistral4
    olmo_hybrid phi phixtral plamo plamo2 stablelm
"""


def is_served_alone(config: Config) -> bool:
    """Whether rows cannot share a batch, so that requests are answered one at a time."""
    return config.architecture in _ALONE.split()


def takes_quantised_cache(config: Config) -> bool:
    """Whether its attention can read keys and values that are packed. Architectures that are not known may."""
    return config.architecture not in _UNQUANTISED.split()


def is_known_to_mlx_lm(config: Config) -> bool:
    """Whether mlx-lm has a model file for it; True where mlx-lm is not installed, or the folder brings its own."""
    models = _mlx_lm_models()
    if config.get("model_file") or models is None:
        return True
    name = config.architecture
    return bool(name) and "/" not in name and not name.startswith(".") and (models / f"{name}.py").is_file()


@cache
def _mlx_lm_models() -> Path | None:
    """The folder of mlx-lm's model files, None where it is not installed."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "models"
