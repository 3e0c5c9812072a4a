"""`mlx-run fit`: the table, and what there is memory for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.inspect.memory import slots
from runner.plan.forecast import ENGINE_BYTES
from tests.inspect.folders import write_llama

TEXT = """
name: dev
memory: {limit: LIMIT}
servers: {lm: {port: 8080}}
models:
  chat: {source: ./chat, batching: {max_rows: 4, prefill_step_size: 128}}
  other: {source: ./other, MORE}
"""


def said(folder: Path, capsys: pytest.CaptureFixture[str], limit: str, more: str = "load: on_demand") -> dict[str, Any]:
    for name in ("chat", "other"):
        write_llama(folder / name)
    (folder / "dev.yaml").write_text(TEXT.replace("LIMIT", limit).replace("MORE", more))
    code = main(["fit", "--json", "--for", "memory=16GiB", str(folder / "dev.yaml")])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    found["code"] = code
    return found


def test_all_of_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(tmp_path, capsys, "1GiB")
    chat = found["models"]["chat"]
    assert found["code"] == 0
    assert (chat["fit"]["rows"], chat["fit"]["context_all"], chat["fit"]["context_one"]) == (4, 2048, 2048)


def test_what_fits_is_the_most_that_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = said(tmp_path, capsys, "1GiB")["models"]["chat"]
    held = whole["weights"] + whole["prefill"]
    limit = ENGINE_BYTES + held + 2 * whole["kv_row"] + 1000
    chat = said(tmp_path, capsys, str(limit))["models"]["chat"]
    found = chat["fit"]
    assert found["rows"] == 2
    step = 256 * whole["kv_per_token"] * slots(4)
    used = held + found["context_all"] * whole["kv_per_token"] * slots(4)
    assert used <= found["room"] < used + step
    assert found["context_one"] == 2048


def test_what_is_loaded_beside_it_takes_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = said(tmp_path, capsys, "1GiB")["models"]["chat"]["fit"]["room"]
    both = said(tmp_path, capsys, "1GiB", more="load: eager")["models"]
    assert both["chat"]["fit"]["room"] == alone - both["other"]["least"] - ENGINE_BYTES


def test_what_does_not_fit_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(tmp_path, capsys, "1MiB")["code"] == 1
    main(["fit", str(tmp_path / "dev.yaml"), "--for", "memory=16GiB"])
    assert "chat: does not fit: " in capsys.readouterr().out


def test_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(tmp_path, capsys, "1GiB")
    assert main(["fit", str(tmp_path / "dev.yaml"), "--for", "memory=16GiB"]) == 0
    text = capsys.readouterr().out
    assert "hold 4 of 4 rows of 2048 tokens, or 4 rows of 2048, or one of 2048" in text
    assert "weights" in text.splitlines()[0]
