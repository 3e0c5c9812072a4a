"""Whether the files that a desired state was resolved to are still those: what was planned an hour ago, or was read a
moment after it was planned, may be other files by now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from runner.plan.digests import BadFolder, DigestCache, FolderDigest, adapter_digest, model_digest
from runner.plan.spec import AdapterSpec, ModelSpec


class Changed(NamedTuple):
    """One source that is not what it was: its dotted path in the manifest, and what is the matter."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def changed_sources(spec: ModelSpec, cache: DigestCache) -> Iterator[Changed]:
    """The model's folder, its draft's and each adapter's, and its chat template's file, where they are gone, damaged,
    or others than when `spec` was resolved."""
    at = f"models.{spec.name}"
    yield from _changed(f"{at}.source", spec.path, spec.weights_digest, model_digest, cache)
    if spec.draft is not None:
        yield from _changed(f"{at}.draft", spec.draft.path, spec.draft.digest, model_digest, cache)
    if (template := spec.chat_template) is not None and _content(template.path) != template.digest:
        yield Changed(f"{at}.chat_template", f"{template.path} changed")
    for adapter in spec.adapters:
        yield from changed_adapter(spec.name, adapter, cache)


def changed_adapter(model: str, adapter: AdapterSpec, cache: DigestCache) -> Iterator[Changed]:
    """One adapter's folder, where it is not what it was when it was resolved."""
    yield from _changed(f"models.{model}.adapters.{adapter.name}", adapter.path, adapter.digest, adapter_digest, cache)


def _content(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""


def _changed(
    at: str, folder: Path, planned: str, digest: Callable[[Path, DigestCache], FolderDigest], cache: DigestCache
) -> Iterator[Changed]:
    try:
        if digest(folder, cache).digest != planned:
            yield Changed(at, f"the files in {folder} changed")
    except BadFolder as error:
        yield Changed(at, error.message)
