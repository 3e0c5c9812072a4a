"""`python -m runner.hub.ask`: what repositories hold, without fetching them.

One line of JSON for each job of the request (`runner.hub.jobs`): `{"listing": …}` or `{"failed": …}`.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import logging

from runner.hub.client import Client, Failed
from runner.hub.jobs import Job, read_request
from runner.hub.listing import listing

_AT_ONCE = 8


def _answer(client: Client, job: Job) -> dict[str, Any]:
    try:
        found = listing(client, job)
    except Failed as error:
        return {"failed": error.failure._asdict()}
    return {"listing": {"repo": job.repo, "revision": job.revision, **found._asdict()}}


def main() -> int:
    """0 when every job has a listing."""
    jobs, token, patience = read_request(json.loads(sys.stdin.buffer.readline()))
    logging.set_verbosity_error()
    client = Client(token, patience)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(lambda job: _answer(client, job), jobs))
    for answer in answers:
        sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return int(any("failed" in answer for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
