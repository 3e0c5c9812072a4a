"""`python -m runner.engine --spec PATH.json --socket PATH.sock`: one engine process. Started by the runner."""

from __future__ import annotations

import gc
import sys
import time

from runner.engine.environment import restart_if_needed, stay_offline, tokenise_in_one_thread


def main() -> int:
    """See `runner.engine.command.serve`."""
    started = restart_if_needed(time.monotonic())
    stay_offline()
    tokenise_in_one_thread()
    gc.disable()  # until the model is loaded (`process.py`): looking for garbage took 12 of 280 ms
    # Imported here: a process that replaces itself first would pay for it twice (40 of 240 ms).
    from runner.engine.command import serve  # noqa: PLC0415

    return serve(sys.argv[1:], started)


if __name__ == "__main__":
    sys.exit(main())
