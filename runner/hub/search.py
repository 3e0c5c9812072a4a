"""`python -m runner.hub.search`: repositories on the hub that match some words, with the sizes of their files.

Reads `{"query", "limit", "token", "patience"}`. Answers in lines of JSON: `{"found": …}` for each, or `{"failed": …}`.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import logging

from runner.hub.client import Client, Failed
from runner.hub.jobs import Job, Patience
from runner.hub.listing import listing

_AT_ONCE = 8


def _described(client: Client, info: Any) -> dict[str, Any]:
    """`files` are those that serving takes, `problem` why it cannot be served."""
    about = {"repo": info.id, "downloads": info.downloads or 0, "likes": info.likes or 0, "gated": bool(info.gated)}
    try:
        found = listing(client, Job(info.id, "main"))
    except Failed as error:
        return {**about, "commit": "", "kinds": [], "files": [], "problem": error.failure.message}
    return {**about, **found._asdict(), "problem": ""}


def main() -> int:
    """0 when the hub answered."""
    asked = json.loads(sys.stdin.buffer.readline())
    logging.set_verbosity_error()
    client = Client(asked["token"], Patience(**asked["patience"]))
    job = Job(f"a search for {asked['query']!r}", "")
    try:
        infos = client.patiently(
            job, lambda: list(client.api.list_models(search=asked["query"], limit=asked["limit"], sort="downloads"))
        )
    except Failed as error:
        print(json.dumps({"failed": error.failure._asdict()}))  # noqa: T201 - to whoever asked
        return 1
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(lambda info: _described(client, info), infos):
            print(json.dumps({"found": found}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
