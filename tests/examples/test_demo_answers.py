"""The demo models answer what they were not trained on."""

import json
import os
import subprocess
import sys

import pytest

from runner.environment import engine_environment
from tests.stories.harness import MODELS, REPOSITORY

pytestmark = pytest.mark.mlx


def test_nine_of_ten_held_out_answers_are_right_to_the_letter_in_every_style() -> None:
    command = [sys.executable, "-m", "tests.examples.answers"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    shares = json.loads(result.stdout)
    assert shares["prompts"] >= 150
    assert min(shares["base"], shares["pirate"], shares["shout"]) >= 0.9


def test_the_draft_is_accepted_as_its_card_says() -> None:
    """Four greedy draft tokens a round, through mlx-lm's own speculation."""
    code = (
        "from train.evaluate import MODELS, measure_acceptance\n"
        "from train.heldout import read_rows\n"
        "print(measure_acceptance(read_rows(MODELS / 'heldout.jsonl')[::6]).all_drafts)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=MODELS,
        env={**os.environ, **engine_environment(os.environ)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) >= 0.7
