"""What `mlx-run init` finds in the hub's cache, and what it says would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.inspect.files import DigestCache
from runner.plan.candidates import CONTEXTS, Candidate, examine, fit, fitting, in_hub_cache, named
from tests.inspect.folders import GEOMETRY, write_llama
from tests.plan.folders import GIB, hub_snapshot, later, write

LARGE = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE |= {"intermediate_size": 8192, "vocab_size": 32000, "max_position_embeddings": 131072}


def digests() -> DigestCache:
    return DigestCache(now=later)


def cached(hub: Path, repo: str, commit: str = "c" * 40, **config: Any) -> Path:
    """A llama in a hub cache."""
    return write_llama(hub_snapshot(hub, repo, {}, commit=commit), **config)


def the(found: list[Candidate]) -> Candidate:
    (one,) = found
    return one


def test_downloaded_models_are_pinned_to_the_commit_that_is_there(tmp_path: Path) -> None:
    cached(tmp_path, "org/small", commit="a" * 40)
    found = the(in_hub_cache(tmp_path, digests()))
    assert (found.source, found.revision, found.problem, found.chats) == ("org/small", "a" * 40, "", True)


def test_the_largest_that_chats_comes_first(tmp_path: Path) -> None:
    for name, layers in (("small", 1), ("large", 4), ("middle", 2), ("base", 8)):
        folder = cached(tmp_path, f"org/{name}", num_hidden_layers=layers)
        if name == "base":
            write(folder / "tokenizer_config.json", "{}")
    assert [c.source for c in in_hub_cache(tmp_path, digests())] == ["org/large", "org/middle", "org/small", "org/base"]


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = cached(tmp_path, "org/new")
    write(folder / "tokenizer_config.json", "{}")
    write(folder / "chat_template.jinja", "{{ messages }}")
    assert the(in_hub_cache(tmp_path, digests())).chats


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_file": "own.py"}, "needs leave to run its own code (own.py)"),
        ({"model_type": "mystery"}, "models of type 'mystery' are not served"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq, not by mlx"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_served_comes_last_and_says_why(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    cached(tmp_path, "org/fine")
    folder = cached(tmp_path, "org/odd")
    settings = {**GEOMETRY, **config}
    write(folder / "config.json", json.dumps({key: value for key, value in settings.items() if value is not None}))
    first, last = in_hub_cache(tmp_path, digests())
    assert (first.source, first.problem) == ("org/fine", "")
    assert problem in last.problem


def test_what_is_no_model_is_passed_over(tmp_path: Path) -> None:
    hub_snapshot(tmp_path, "org/config-only", {"config.json": b"{}"})
    write(tmp_path / "datasets--org--data" / "refs" / "main", "c" * 40)
    (tmp_path / "models--org--empty" / "snapshots").mkdir(parents=True)
    assert in_hub_cache(tmp_path, digests()) == []
    assert in_hub_cache(tmp_path / "nowhere", digests()) == []


def test_a_snapshot_that_no_branch_names(tmp_path: Path) -> None:
    cached(tmp_path, "org/pinned", commit="d" * 40)
    (tmp_path / "models--org--pinned" / "refs" / "main").unlink()
    assert the(in_hub_cache(tmp_path, digests())).revision == "d" * 40


def test_folders_and_repositories_by_name(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "mine")
    assert named(str(folder), tmp_path / "hub", digests()).facts is not None
    assert named("org/elsewhere", tmp_path / "hub", digests()).facts is None


def test_what_fits_is_what_the_estimate_says(tmp_path: Path) -> None:
    candidate = examine(write_llama(tmp_path / "m", **LARGE), digests(), source="m")
    for gib in (4, 8, 16, 64):
        found = fit(candidate, gib * GIB, float32=False)
        assert found is not None
        assert found.memory == candidate.memory(found.context, found.rows, float32=False)
        assert found.memory.most <= gib * GIB


def test_more_memory_never_means_less(tmp_path: Path) -> None:
    candidate = examine(write_llama(tmp_path / "m", **LARGE), digests(), source="m")
    fits = [fit(candidate, gib * GIB, float32=False) for gib in range(3, 80)]
    sizes = [(f.context * f.rows, f.context) for f in fits if f is not None]
    assert [s[0] for s in sizes] == sorted(s[0] for s in sizes)
    assert sizes[-1] == (32 * CONTEXTS[0], CONTEXTS[0])


def test_a_context_is_never_longer_than_the_models_own(tmp_path: Path) -> None:
    candidate = examine(write_llama(tmp_path / "m", max_position_embeddings=3000), digests(), source="m")
    found = fit(candidate, 64 * GIB, float32=False)
    assert found is not None
    assert found.context == 3000


def test_what_does_not_fit_at_all(tmp_path: Path) -> None:
    candidate = examine(write_llama(tmp_path / "m", **LARGE), digests(), source="m")
    assert fit(candidate, candidate.stored, float32=False) is None
    assert list(fitting([candidate], candidate.stored, float32=False)) == []
