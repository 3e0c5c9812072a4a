"""Exact match and draft acceptance of the committed files, loaded through mlx-lm in float32."""

from __future__ import annotations

import argparse
import platform
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, load, stream_generate

from .heldout import Row, heldout_rows, read_rows
from .styles import ADAPTERS

MODELS = Path(__file__).resolve().parent.parent
DRAFT_TOKENS = 4
_MAX_TOKENS = 512
_CARD_START, _CARD_END = "<!-- figures: written by train.evaluate -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Acceptance:
    """
    Of the drafted tokens, those that the base accepted. `usable` leaves out drafts past the end of an answer,
    which nobody could have used; `all_drafts` counts them as refused.
    """

    usable: float
    all_drafts: float
    rounds: int


def load_chat(style: str, folder: Path = MODELS) -> tuple[Any, Any]:
    adapter = None if style == "base" else str(folder / "adapters" / style)
    model, tokenizer = load(str(folder / "demo-chat"), adapter_path=adapter)
    model.set_dtype(mx.float32)
    return model, tokenizer


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), add_generation_prompt=True, tokenize=True
        )
    )


def answers(model: Any, tokenizer: Any, rows: list[Row]) -> list[str]:
    """Greedy answers, all rows in one batch."""
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    return list(batch_generate(model, tokenizer, prompts, max_tokens=_MAX_TOKENS).texts)


def exact_match(rows: list[Row], texts: list[str], style: str) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind of task."""
    found: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        found[row["kind"]].append(text == row[style])
    return {kind: (sum(right), len(right)) for kind, right in found.items()}


def share(scores: dict[str, tuple[int, int]]) -> float:
    return sum(right for right, _ in scores.values()) / sum(asked for _, asked in scores.values())


def acceptance(model: Any, draft: Any, tokenizer: Any, rows: list[Row]) -> Acceptance:
    """Every round drafts four tokens; it ends with one token of the base, or with the end of the answer."""
    accepted = rounds = unusable = 0
    for row in rows:
        run = 0
        for response in stream_generate(
            model,
            tokenizer,
            prompt_ids(tokenizer, row),
            max_tokens=_MAX_TOKENS,
            draft_model=draft,
            num_draft_tokens=DRAFT_TOKENS,
        ):
            run = run + 1 if response.from_draft else 0
            accepted += response.from_draft
            rounds += not response.from_draft
        if run:
            rounds += 1
            unusable += DRAFT_TOKENS - run
    drafted = rounds * DRAFT_TOKENS
    return Acceptance(accepted / (drafted - unusable), accepted / drafted, rounds)


def measure_acceptance(rows: list[Row], style: str = "base", folder: Path = MODELS) -> Acceptance:
    model, tokenizer = load_chat(style, folder)
    draft, _ = load(str(folder / "demo-draft"))
    draft.set_dtype(mx.float32)
    return acceptance(model, draft, tokenizer, rows)


def _table(scores: dict[str, dict[str, tuple[int, int]]]) -> list[str]:
    styles = list(scores)
    lines = ["| kind | " + " | ".join(styles) + " |", "|---|" + "---:|" * len(styles)]
    for kind in scores["base"]:
        cells = [f"{right}/{asked}" for right, asked in (scores[style][kind] for style in styles)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return [*lines, "| **all** | " + " | ".join(f"**{share(scores[style]):.1%}**" for style in styles) + " |"]


def _report(rows: list[Row], drafted_styles: tuple[str, ...]) -> list[str]:
    scores = {}
    for style in ("base", *ADAPTERS):
        model, tokenizer = load_chat(style)
        texts = answers(model, tokenizer, rows)
        scores[style] = exact_match(rows, texts, style)
        for row, text in zip(rows, texts, strict=True):
            if text != row[style]:
                print(f"{style} {row['messages'][-1]['content']!r}\n  want {row[style]!r}\n  got  {text!r}")
    lines = _table(scores)
    for style in drafted_styles:
        found = measure_acceptance(rows, style)
        lines += ["", f"Acceptance, {style}: {found.usable:.3f} of the usable drafts, {found.all_drafts:.3f} of all "]
        lines[-1] += f"({found.rounds} rounds of {DRAFT_TOKENS}, greedy)."
    return lines


def _write_card(path: Path, lines: list[str]) -> None:
    before, _, rest = path.read_text().partition(_CARD_START)
    _, _, after = rest.partition(_CARD_END)
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    where = f"Measured in float32 on the {mx.default_device().type.name} backend ({platform.machine()}), {versions}."
    path.write_text(before + "\n".join([_CARD_START, where, "", *lines, _CARD_END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, help="draw this many fresh prompts a kind instead of heldout.jsonl")
    parser.add_argument("--draft-styles", default="base", help="styles to measure the draft with, or none")
    parser.add_argument("--card", type=Path, help="write the figures into this model card")
    given = parser.parse_args()
    rows = heldout_rows(1000, given.each) if given.each else read_rows(MODELS / "heldout.jsonl")
    lines = _report(rows, tuple(style for style in given.draft_styles.split(",") if style != "none"))
    print("\n".join(lines))
    if given.card:
        _write_card(given.card, lines)


if __name__ == "__main__":
    main()
