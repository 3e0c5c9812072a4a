"""
Makes the demo models. From examples/models: `python -m train all`, on Metal, CUDA or the CPU.

`base` makes the tokenizer, the held-out prompts and demo-chat; `draft`, `pirate` and `shout` need `base`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from .data import batches, make_rows
from .fit import Plan, fit
from .heldout import heldout_rows, write_rows
from .network import add_lora, model_config, new_model, parameter_count, save_adapter, save_model
from .styles import ADAPTERS
from .tokenizer import make_tokenizer, save_tokenizer

SEED = 20
CONVERSATIONS = 400_000
HELD_OUT_EACH = 15
PLANS = {
    "base": Plan(steps=16000, learning_rate=2e-3),
    "draft": Plan(steps=12000, learning_rate=3e-3),
    "adapter": Plan(steps=4000, learning_rate=2e-3, warmup=50, weight_decay=0.0),
}
# The draft serves the adapters too: once an answer has begun in a style, it can go on in it.
DRAFT_STYLES = {"base": 0.7, "pirate": 0.15, "shout": 0.15}


def make_base(folder: Path, plan: Plan, conversations: int) -> None:
    tokenizer = make_tokenizer(SEED)
    for name in ("demo-chat", "demo-draft"):
        save_tokenizer(tokenizer, folder / name)
    write_rows(heldout_rows(SEED, HELD_OUT_EACH), folder / "heldout.jsonl")
    rows = make_rows(folder / "demo-chat" / "tokenizer.json", SEED, {"base": 1.0}, conversations)
    config = model_config("demo-chat", tokenizer.get_vocab_size())
    model = new_model(config, SEED)
    print(f"demo-chat: {parameter_count(model):,} parameters, {mx.default_device()}", flush=True)
    fit(model, batches(rows, SEED, plan.tokens), plan, "base")
    save_model(model, config, folder / "demo-chat")


def make_draft(folder: Path, plan: Plan, conversations: int) -> None:
    rows = make_rows(folder / "demo-chat" / "tokenizer.json", SEED + 1, DRAFT_STYLES, conversations)
    tokenizer = Tokenizer.from_file(str(folder / "demo-draft" / "tokenizer.json"))
    config = model_config("demo-draft", tokenizer.get_vocab_size())
    model = new_model(config, SEED + 1)
    print(f"demo-draft: {parameter_count(model):,} parameters", flush=True)
    fit(model, batches(rows, SEED + 1, plan.tokens), plan, "draft")
    save_model(model, config, folder / "demo-draft")


def make_adapter(style: str, folder: Path, plan: Plan, conversations: int) -> None:
    model, _ = load_model(folder / "demo-chat")
    seed = SEED + 2 + ADAPTERS.index(style)
    rows = make_rows(folder / "demo-chat" / "tokenizer.json", seed, {style: 1.0}, conversations)
    add_lora(model, seed)
    fit(model, batches(rows, seed, plan.tokens), plan, style)
    save_adapter(model, folder / "adapters" / style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "base", "draft", *ADAPTERS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--steps", type=int, help="fewer steps, for a rehearsal")
    parser.add_argument("--tokens", type=int, help="fewer tokens a step, for a rehearsal")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    given = parser.parse_args()
    changes = {key: value for key in ("steps", "tokens") if (value := getattr(given, key))}
    plans = {name: replace(plan, **changes) for name, plan in PLANS.items()}
    if given.what in ("all", "base"):
        make_base(given.folder, plans["base"], given.conversations)
    if given.what in ("all", "draft"):
        make_draft(given.folder, plans["draft"], given.conversations)
    for style in ADAPTERS:
        if given.what in ("all", style):
            make_adapter(style, given.folder, plans["adapter"], given.conversations // 2)


if __name__ == "__main__":
    main()
