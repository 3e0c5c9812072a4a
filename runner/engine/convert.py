"""`python -m runner.engine.convert SETTINGS.json`: quantises a model folder into another.

The runner starts it before an engine that needs it (`runner.control.conversion`), and makes the result known only when
it is complete. A line on stdout is a message in JSON: `{"done": bytes, "of": bytes}` as it goes on, or
`{"error": reason, "hint": what to do}` and exit code 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from runner.engine.environment import restart_if_needed, stay_offline

_TELL_EVERY: Final = 0.2
"""Seconds between two messages."""


def main(arguments: list[str]) -> int:
    """Convert as the settings file says, which has `source` and `target` too."""
    settings = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    # Imported here: a process that replaces itself first would pay for it twice.
    from runner.engine.conversion import Refused, convert  # noqa: PLC0415

    told = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now >= told + _TELL_EVERY or done == of:
            told = now
            _say({"done": done, "of": of})

    try:
        convert(Path(settings["source"]), Path(settings["target"]), settings, tell)
    except Refused as refusal:
        _say({"error": str(refusal), "hint": "change or remove quantization"})
        return 1
    except Exception as error:  # noqa: BLE001 - whatever upstream trips over is the reason
        _say({"error": f"{type(error).__name__}: {error}", "hint": ""})
        return 1
    return 0


def _say(message: Mapping[str, Any]) -> None:
    """On the stdout that the runner reads, and which nothing else writes to."""
    sys.__stdout__.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    restart_if_needed(time.monotonic())
    stay_offline()
    sys.stdout = sys.stderr  # upstream prints
    sys.exit(main(sys.argv[1:]))
