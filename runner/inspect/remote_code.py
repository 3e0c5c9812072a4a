"""The Python code that a model's folder brings, and asks for by name, as mlx-lm and transformers look for it."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from runner.inspect.files import DigestCache, file_version, json_object


class RemoteCode(NamedTuple):
    """Names of Python files, each empty where none is asked for. `model` is config.json's `model_file`, which has the
    architecture (mlx-lm loads no such model without it); `tokenizer` is from the `auto_map` of tokenizer_config.json.

    `elsewhere` is the repository that the tokenizer's code is in, empty of the folder itself. `known`: transformers has
    a tokenizer of its own for this model, and takes that where the code may not be run.
    """

    model: str = ""
    tokenizer: str = ""
    elsewhere: str = ""
    known: bool = True

    @property
    def needed(self) -> tuple[str, ...]:
        """Those without which the model cannot be loaded at all."""
        return tuple(filter(None, (self.model, "" if self.known else self.tokenizer)))

    @property
    def files(self) -> tuple[str, ...]:
        """Those that are run, where they may be, and have to lie in the folder."""
        return tuple(filter(None, (self.model, "" if self.elsewhere else self.tokenizer)))


def remote_code(folder: Path, digests: DigestCache) -> RemoteCode:
    """What a folder asks for. Raises BadFolder where a file is not whole."""
    config = file_version(folder / "config.json")
    model, kind = digests.remember("model file", config, _model_file) if config is not None else ("", "")
    settings = file_version(folder / "tokenizer_config.json")
    tokenizer = digests.remember("tokenizer code", settings, _tokenizer_code) if settings is not None else None
    if tokenizer is None:
        return RemoteCode(model)
    file, elsewhere, own = tokenizer
    return RemoteCode(model, file, elsewhere, _is_known(own) or _is_known(kind))


def _model_file(path: Path) -> tuple[str, str]:
    """The file, and the model type."""
    config = json_object(path)
    named = config.get("model_file")
    return "" if named is None else str(named), str(config.get("model_type") or "")


def _tokenizer_code(path: Path) -> tuple[str, str, str] | None:
    """Its file, the other repository that it is in, and the class that transformers might have. Of a fast and a slow
    class transformers takes the fast one."""
    settings = json_object(path)
    found: Any = settings.get("auto_map")
    if isinstance(found, dict):
        found = found.get("AutoTokenizer")
    if isinstance(found, list):
        found = next((one for one in reversed(found[:2]) if one), None)
    if not isinstance(found, str) or not found:
        return None
    repository, _, reference = found.rpartition("--")
    return f"{reference.partition('.')[0]}.py", repository, str(settings.get("tokenizer_class") or "")


def _is_known(name: str) -> bool:
    """Whether transformers lists it among its tokenizers and their models; of a class the fast one counts as well."""
    slow = name.removesuffix("Fast")
    listed = _tokenizers_of_transformers()
    return bool(slow) and any(f'"{one}"' in listed for one in (slow, f"{slow}Fast"))


@cache
def _tokenizers_of_transformers() -> str:
    """The source of its list, empty where it is not installed: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    file = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto" / "tokenization_auto.py"
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
