"""A first manifest, with comments: what `mlx-run init` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from runner.manifest.values import format_size
from runner.plan.candidates import PREFIX_CACHE, Candidate, Fit
from runner.plan.verdict import LIMIT_PERCENT

KEY_VARIABLE: Final = "MLX_RUN_API_KEY"

_UNSEEN_CONTEXT: Final = 8192
_UNSEEN_ROWS: Final = 8
"""Limits of a model that is not downloaded yet, so that nothing is known of it."""

_HEAD: Final = """\
# What mlx-run serves on this machine. Start it with
#
#     mlx-run apply {file}
#
# and leave it running: what you save here is live in the next answer, and a broken edit changes nothing.
# `mlx-run plan {file}` says beforehand what an edit would do. For completion and checks in an editor, write
# `mlx-run schema -o mlx-run.schema.json`, and make this the first line:
#     # yaml-language-server: $schema=./mlx-run.schema.json
"""

RECOMMENDED: Final = (
    (24, "mlx-community/Qwen3-14B-4bit"),
    (12, "mlx-community/Qwen3-8B-4bit"),
    (6, "mlx-community/Llama-3.2-3B-Instruct-4bit"),
    (0, "mlx-community/Llama-3.2-1B-Instruct-4bit"),
)
"""GiB that models may use, and what to download with so much when nothing is there: about a third for the weights."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model to serve, and the limits it fits with; None where it is not downloaded yet."""

    candidate: Candidate
    fit: Fit | None


@dataclass(frozen=True, slots=True)
class Starter:
    """Everything that is decided. `others` could be served too, and are written as comments. `machine` is in bytes.

    With `open_to_network` the server listens on all interfaces and wants a key from the environment.
    """

    file: str
    name: str
    port: int
    chosen: Sequence[Chosen]
    others: Sequence[Chosen]
    machine: int
    open_to_network: bool = False


def recommended(budget: int, *, gpu: bool) -> str:
    """A repository to begin with, where models may use `budget` bytes: without a GPU the smallest, for its speed."""
    return next(repo for gib, repo in RECOMMENDED if budget >= gib * 2**30 and (gpu or not gib))


def compose(starter: Starter) -> str:
    """The text of the manifest."""
    budget = starter.machine * LIMIT_PERCENT // 100
    lines = [
        *_HEAD.format(file=starter.file).splitlines(),
        "",
        f"name: {_scalar(starter.name)}",
        "",
        f"memory: {{limit: {LIMIT_PERCENT}%}}    # {format_size(budget)} of {format_size(starter.machine)}",
        "",
        "servers:",
        "  main:",
        f"    port: {starter.port}",
        *_access(starter.open_to_network),
        "",
        "models:",
    ]
    taken: set[str] = set()
    for chosen in starter.chosen:
        lines += [*_model(chosen, model_name(chosen.candidate.source, taken), detailed=True), ""]
    if starter.others:
        lines.append("  # These are in the hub's cache too. Without the #s they are served, as far as the memory goes:")
        for other in starter.others:
            name = model_name(other.candidate.source, taken)
            lines += [f"  # {line[2:]}" for line in _model(other, name, detailed=False)]
    return "\n".join(lines).rstrip() + "\n"


def model_name(source: str, taken: set[str]) -> str:
    """A name for requests, from a repository's or a folder's; not one of `taken`, which it joins.

    What says how a model is stored is left out: Llama-3.2-1B-Instruct-4bit is llama-3.2-1b-instruct.
    """
    last = source.rstrip("/").rpartition("/")[2].lower()
    last = re.sub(r"[-_.](mlx|[2-8]bit|bf16|fp16|f16|mxfp4|mxfp8|nvfp4|q[2-8]|dwq|gs\d+)(?=[-_.]|$)", "", last)
    base = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:60] or "model"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


def _access(open_to_network: bool) -> list[str]:
    if open_to_network:
        return [
            "    host: 0.0.0.0    # every interface of this machine",
            f'    auth: {{api_keys: ["${{{KEY_VARIABLE}:?set it to the key that clients shall send}}"]}}',
        ]
    return [
        "    # host: 0.0.0.0    # to be reached from other machines; then a key is needed, or a word that it is not:",
        f'    # auth: {{api_keys: ["${{{KEY_VARIABLE}}}"]}}',
    ]


def _model(chosen: Chosen, name: str, *, detailed: bool) -> Iterator[str]:
    candidate, found = chosen.candidate, chosen.fit
    yield f"  {_scalar(name)}:"
    if candidate.facts is None:
        yield f"    source: {_scalar(candidate.source)}    # downloaded by the first apply"
        yield f"    kv_cache: {{max_context: {_UNSEEN_CONTEXT}}}    # tokens of a prompt and its answer together"
        yield f"    batching: {{max_rows: {_UNSEEN_ROWS}}}    # requests that are answered together"
        return
    yield f"    source: {_scalar(candidate.source)}    # {format_size(candidate.stored)}"
    if candidate.revision:
        yield f'    revision: "{candidate.revision}"    # the commit in the hub cache'
    if found is None:
        return
    if not detailed:
        yield f"    kv_cache: {{max_context: {found.context}}}"
        yield f"    batching: {{max_rows: {found.rows}}}    # {format_size(found.memory.most)} at most"
        return
    longest = candidate.facts.config.max_context
    own = f"; the model can {longest}" if longest > found.context else ""
    cost = f", {format_size(found.memory.kv_per_token)} each" if found.memory.kv_per_token else ""
    yield "    kv_cache:"
    yield f"      max_context: {found.context}    # tokens of a prompt and its answer together{cost}{own}"
    yield f"      prefix_cache: {format_size(PREFIX_CACHE).replace(' ', '')}    # keeps what earlier prompts began with"
    yield "    batching:"
    yield f"      max_rows: {found.rows}    # requests that are answered together; others wait"
    yield f"    # With all of these at their longest the model takes {format_size(found.memory.most)}."
    yield "    # adapters: {pirate: ./adapters/pirate}    # LoRA, a folder or a repository; requests choose one:"
    yield f'    #     {{"model": "{name}:pirate"}}'
    yield "    # generation: {temperature: 0.7, max_tokens: 1024}    # what requests leave out"


def _scalar(text: str) -> str:
    """As YAML, plain where that is read back as it is."""
    if re.fullmatch(r"[A-Za-z./~][A-Za-z0-9./_~-]*", text) and text.lower() not in ("null", "true", "false", "~"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
