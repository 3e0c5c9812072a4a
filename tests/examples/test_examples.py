"""Every file that users are shown is checked: manifests validate and resolve, demo models are as their card says."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from runner.inspect.tensors import read_tensors
from runner.machine import machine_memory
from runner.manifest.load import load_manifest
from runner.plan.digests import DigestCache
from runner.plan.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [ROOT / "configs" / name for name in ("dev.yaml", "minimal.yaml")]
"""Those that need no network; production.yaml has a test of its own."""

MODELS = ROOT / "examples" / "models"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_validates_and_resolves(path: Path) -> None:
    loaded = load_manifest(path, os.environ)
    desired = resolve(loaded, machine_memory=machine_memory(), cache=DigestCache())
    assert desired.name == path.stem
    assert desired.models


def test_minimal_is_six_lines() -> None:
    assert len((ROOT / "configs" / "minimal.yaml").read_text().splitlines()) == 6


def test_the_manifest_in_the_readme_validates(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "readme.yaml"
    path.write_text(block)
    assert load_manifest(path, {}).manifest.name == yaml.safe_load(block)["name"]


def test_all_weights_together_are_small() -> None:
    files = list(MODELS.rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) <= 16e6


def test_the_draft_is_about_a_tenth_and_shares_the_tokenizer() -> None:
    chat, draft = (read_tensors(MODELS / name / "model.safetensors").nbytes for name in ("demo-chat", "demo-draft"))
    assert 0.05 < draft / chat < 0.15
    chat_tokenizer, draft_tokenizer = (
        (MODELS / n / "tokenizer.json").read_bytes() for n in ("demo-chat", "demo-draft")
    )
    assert chat_tokenizer == draft_tokenizer


def test_held_out_prompts_cover_every_kind_and_style() -> None:
    rows = [json.loads(line) for line in (MODELS / "heldout.jsonl").read_text().splitlines()]
    assert len({row["kind"] for row in rows}) >= 10
    assert all(row[style] for row in rows for style in ("base", "pirate", "shout"))
