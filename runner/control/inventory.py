"""What is in the hub's cache and in local folders, and who uses it, for the admin API.

`python -m runner.control.inventory STATE CONVERTED` prints it as JSON, as `mlx-run models list --json` does. It is a
process of its own: it reads manifests, and the runner imports neither pydantic nor YAML.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from runner.errors import Unavailable
from runner.hub.cache import hub_cache
from runner.processes import python_module


async def inventory(state: Path, converted: Path) -> dict[str, Any]:
    """`models` and `notes`, for the runners of a state folder, and the copies in `converted`. Raises Unavailable: it
    cannot be found out."""
    process = await asyncio.create_subprocess_exec(
        *python_module("runner.control.inventory", str(state), str(converted)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:  # whoever asked has left
            process.kill()
            await process.wait()
    if process.returncode:
        reason = (errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise Unavailable(f"the models that are there cannot be listed: {reason}", code="inventory_failed")
    found: dict[str, Any] = json.loads(output)
    return found


def main() -> None:
    """Look, and print."""
    # Imported here: the runner imports this module, and must not import this.
    from runner.control.uses import available_here, known_uses  # noqa: PLC0415

    state, converted = map(Path, sys.argv[1:])
    cache = hub_cache(os.environ)
    known = known_uses(state, cache, converted)
    found = available_here(cache, converted, known)
    print(json.dumps({"models": [one.as_json for one in found], "notes": list(known.notes)}))  # noqa: T201


if __name__ == "__main__":
    main()
