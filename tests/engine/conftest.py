"""Tiny models, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.engine.loader import LoadedModel, load
from tests.engine.tiny import WIDE, build_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here runs MLX."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mlx)


ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """`model_folder(model_type, bits=0, wide=False)`: a folder that tests share and do not write to. Wide heads have 64
    values, which a quantised KV cache needs."""
    built: dict[tuple[str, int, bool], Path] = {}

    def get(model_type: str = "llama", bits: int = 0, *, wide: bool = False) -> Path:
        key = (model_type, bits, wide)
        if key not in built:
            folder = tmp_path_factory.mktemp(f"{model_type}-{bits}")
            built[key] = build_model(
                folder, model_type, bits=bits, config=WIDE.get(model_type, WIDE[""]) if wide else {}
            )
        return built[key]

    return get


@pytest.fixture(scope="session")
def llama(model_folder: ModelFolder) -> LoadedModel:
    """A loaded llama without adapters; tests that load adapters load their own."""
    return load(model_folder("llama"))
