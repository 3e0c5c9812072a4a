"""Whether a model, or its draft, can be loaded without running Python code that it brings, or may run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runner.inspect.files import BadFolder, DigestCache
from runner.inspect.remote_code import RemoteCode, remote_code
from runner.manifest.tree import KeyPath, Problem
from runner.plan.subject import Subject


def check_code(it: Subject, cache: DigestCache) -> Iterator[Problem]:
    """Of one deployment. A tokenizer that transformers may have itself is left to loading."""
    if it.facts is not None:
        yield from _check(it.spec.path, (*it.path, "source"), cache, trusted=it.spec.trust_remote_code)
    if it.spec.draft is not None and it.draft is not None:
        yield from _check(it.spec.draft.path, it.source_of("draft"), cache, trusted=it.spec.draft.trust_remote_code)


def _check(folder: Path, at: KeyPath, cache: DigestCache, *, trusted: bool) -> Iterator[Problem]:
    try:
        code = remote_code(folder, cache)
    except BadFolder as error:
        yield Problem(error.code, at, error.message, error.hint)
        return
    if not trusted:
        if code.needed:
            what = "architecture" if code.model else "tokenizer"
            message = f"brings its {what} as Python code ({code.needed[0]}), which is not run without leave"
            yield Problem("E613", at, message, "read it; if you trust it, write trust_remote_code: true beside source")
        return
    yield from _unusable(folder, code, at)


def _unusable(folder: Path, code: RemoteCode, at: KeyPath) -> Iterator[Problem]:
    if code.elsewhere:
        message = f"its tokenizer is Python code of another repository ({code.elsewhere}), which nothing pins"
        hint = "copy the model into a folder with that code, and take the name before -- out of auto_map"
        yield Problem("E614", at, message, hint)
    for name in code.files:
        if "/" in name or not name.endswith(".py"):
            message, hint = f"asks for the code {name!r}, which is no Python file beside config.json", "move it there"
            yield Problem("E614", at, message, hint)
        elif not (folder / name).is_file():
            yield Problem("E614", at, f"asks for the code {name}, which is not there", "download or copy it again")
