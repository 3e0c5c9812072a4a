"""Logits that are infinite or NaN: a row with a grammar ends with an error that says so, and nobody else notices."""

from __future__ import annotations

import shutil
from math import nan
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from runner.engine.loader import load
from runner.protocol import AdapterSource, Grammar
from tests.engine.adapters.folders import ATTENTION, draw, linear_shapes, write_mlx
from tests.engine.conftest import ModelFolder
from tests.engine.drive import Driver, generate
from tests.engine.speculative.drafts import SLACK, always, draft_folder, speculating
from tests.engine.tiny import encode

PROMPT = encode("the quick brown fox")
COUNT = Grammar("regex", "[a-e]{4}", "response_format")


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("drafted", [0, 3])
def test_a_row_whose_logits_are_no_numbers_ends_alone(
    model_folder: ModelFolder, tmp_path: Path, drafted: int, rate: float
) -> None:
    """Its adapter holds numbers, but what comes of them is too large for one. Its place can be used again."""
    loaded = load(model_folder("llama"), slack=SLACK)
    shapes = linear_shapes(loaded, ATTENTION)
    huge = {path: (mx.full(a.shape, 1e30), mx.full(b.shape, 1e30)) for path, (a, b) in draw(shapes, 2, 1).items()}
    speculation = None
    if drafted:
        draft = draft_folder(model_folder("llama"), tmp_path / "draft", "self")
        speculation = speculating(loaded, draft, always(drafted))
    driver = Driver(loaded, speculation=speculation, num_draft_tokens=drafted, max_rows=3)
    driver.engine.load_adapter(AdapterSource("huge", str(write_mlx(tmp_path / "huge", huge, keys=None))))
    plain = {"prompt": PROMPT, "max_tokens": 24, "temperature": rate, "seed": 5}
    alone = driver.one(**plain)
    held = driver.one(**plain, grammar=COUNT)
    asked = [plain, {**plain, "adapter": "huge", "grammar": COUNT}, {**plain, "grammar": COUNT}, plain]
    answers = driver.run(generate(number, **fields) for number, fields in enumerate(asked))
    assert answers[1].finish_reason == "error"
    assert "is not numbers" in answers[1].error
    assert answers[1].text == ""
    assert (answers[0].text, answers[3].text, answers[2].text) == (alone.text, alone.text, held.text)
    assert driver.engine.stats().failed_total == 1


def test_a_token_that_no_number_belongs_to_is_no_matter_where_it_is_not_allowed(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder("llama"), folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    for token in encode("z") + encode("9"):
        weights["lm_head.weight"][token] = nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    whole, broken = (Driver(load(path)) for path in (model_folder("llama"), folder))
    asked = {"prompt": PROMPT, "max_tokens": 24, "grammar": COUNT}
    assert broken.one(**asked).text == whole.one(**asked).text
    refused = broken.one(**{**asked, "grammar": Grammar("regex", "z{4}", "response_format")})
    assert (refused.finish_reason, "is not numbers" in refused.error) == ("error", True)
