"""The text that `mlx-run init` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.inspect.files import DigestCache
from runner.machine import Machine
from runner.manifest.load import load_manifest
from runner.plan.candidates import Candidate, examine, fit
from runner.plan.resolve import look
from runner.plan.starter import RECOMMENDED, Chosen, Starter, compose, model_name, recommended
from tests.inspect.folders import write_llama
from tests.plan.folders import GIB, later


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", "llama-3.2-1b-instruct"),
        ("mlx-community/Qwen3-30B-A3B-4bit-DWQ", "qwen3-30b-a3b"),
        ("mlx-community/gemma-3-12b-it-bf16", "gemma-3-12b-it"),
        ("./models/My Model/", "my-model"),
        ("org/___", "model"),
        ("org/" + "x" * 80, "x" * 60),
    ],
)
def test_names_say_what_a_model_is(source: str, name: str) -> None:
    assert model_name(source, set()) == name


def test_names_are_distinct() -> None:
    taken: set[str] = set()
    names = [model_name(source, taken) for source in ("a/m-4bit", "b/M-8bit", "c/m")]
    assert names == ["m", "m-2", "m-3"]
    assert taken == set(names)


def test_something_is_recommended_for_every_machine() -> None:
    assert recommended(0, gpu=True) == recommended(1000 * GIB, gpu=False) == RECOMMENDED[-1][1]
    assert recommended(1000 * GIB, gpu=True) == RECOMMENDED[0][1]


def starter(folder: Path, *, others: int = 0, open_to_network: bool = False, **config: object) -> Starter:
    """A manifest with one model below `folder`, a machine with 16 GiB, and others that would fit too."""
    digests = DigestCache(now=later)
    chosen = []
    for number in range(1 + others):
        write_llama(folder / f"m{number}", **config)
        candidate = examine(folder / f"m{number}", digests, source=f"./m{number}")
        chosen.append(Chosen(candidate, fit(candidate, 12 * GIB, float32=False)))
    return Starter("it.yaml", "it", 8080, chosen[:1], chosen[1:], 16 * GIB, open_to_network)


def found(folder: Path, text: str, **env: str) -> list[str]:
    """What `validate` has to say of it on that machine: errors and warnings."""
    path = folder / "it.yaml"
    path.write_text(text)
    seen = look(load_manifest(path, env), Machine(16 * GIB), DigestCache(now=later))
    return [str(d) for d in (*seen.wrong, *seen.missing, *seen.desired.warnings)]


def test_it_is_sound_without_a_word(tmp_path: Path) -> None:
    assert found(tmp_path, compose(starter(tmp_path))) == []


def test_so_it_is_with_what_is_commented_out(tmp_path: Path) -> None:
    text = compose(starter(tmp_path, others=2, max_position_embeddings=512))
    before, after = text.split("  # These are in the hub's cache too.")
    uncommented = re.sub(r"(?m)^  # ", "  ", after.partition("\n")[2])
    assert found(tmp_path, before + uncommented) == []
    assert list(load_manifest(tmp_path / "it.yaml", {}).manifest.models) == ["m0", "m1", "m2"]


def test_every_suggestion_in_a_comment_is_sound(tmp_path: Path) -> None:
    lines = compose(starter(tmp_path)).splitlines()
    suggested = [i for i, line in enumerate(lines) if line.strip().startswith(("# host:", "# auth:", "# generation:"))]
    assert len(suggested) == 3
    for i in suggested:
        lines[i] = lines[i].replace("# ", "", 1)
    assert found(tmp_path, "\n".join(lines), MLX_RUN_API_KEY="k") == []


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    text = compose(starter(tmp_path, open_to_network=True))
    assert found(tmp_path, text, MLX_RUN_API_KEY="k") == []
    assert load_manifest(tmp_path / "it.yaml", {"MLX_RUN_API_KEY": "k"}).manifest.servers["main"].host == "0.0.0.0"


@pytest.mark.parametrize("name", ["2024", "1e3", "null", "true", "0x10"])
def test_names_that_yaml_would_take_for_something_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(compose(Starter("it.yaml", name, 1, [Chosen(Candidate(f"org/{name}"), None)], [], GIB)))
    manifest = load_manifest(path, {}).manifest
    assert (manifest.name, list(manifest.models)) == (name, [name])


@pytest.mark.parametrize("source", ["org/name", "./with space", '/odd/"quoted"', "~/mine", "./#hash: yes"])
def test_sources_are_read_back_as_they_are(tmp_path: Path, source: str) -> None:
    text = compose(Starter("it.yaml", "it", 1, [Chosen(Candidate(source), None)], [], GIB))
    path = tmp_path / "it.yaml"
    path.write_text(text)
    (model,) = load_manifest(path, {}).manifest.models.values()
    assert model.source == source
