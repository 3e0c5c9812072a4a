"""`python -m tests.examples.answers`: exact match of the demo models on all held-out prompts, as JSON by style.

All styles run in one batch of our own engine, in a process of its own, which finds OpenBLAS as engines do.
"""

from __future__ import annotations

import json
import time

from runner.engine import environment
from runner.protocol import AdapterSource
from tests.stories.demo import HELD_OUT
from tests.stories.harness import MODELS

STYLES = {"base": "", "pirate": "pirate", "shout": "shout"}


def main() -> None:
    """Answer everything, print the shares."""
    environment.restart_if_needed(time.monotonic())
    from runner.engine import upstream  # noqa: F401 - before anything of mlx_lm
    from runner.engine.loader import load
    from tests.engine.drive import Driver, generate

    driver = Driver(load(MODELS / "demo-chat"), max_rows=32, prefill_step_size=2048)
    for name in ("pirate", "shout"):
        driver.engine.load_adapter(AdapterSource(name, str(MODELS / "adapters" / name)))
    rows = [row for row in HELD_OUT if not row.get("tools")]
    asked = dict(enumerate((row, style) for row in rows for style in STYLES))
    answers = driver.run(
        generate(number, messages=row["messages"], adapter=STYLES[style]) for number, (row, style) in asked.items()
    )
    shares = {}
    for style in STYLES:
        right = [answers[n].text == row[style] for n, (row, asked_style) in asked.items() if asked_style == style]
        shares[style] = sum(right) / len(right)
    print(json.dumps({"prompts": len(rows), **shares}))


if __name__ == "__main__":
    main()
