"""`mlx-run pull`: brings a manifest's repositories, or one, into the hub's cache."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import time
from pathlib import Path

from runner.cli.locate import add_manifest, manifests
from runner.cli.pull_view import PullView
from runner.cli.result import print_line
from runner.control.fetching import download_failed
from runner.errors import DownloadFailed, UsageError
from runner.hub.download import Refused, download
from runner.hub.jobs import Job
from runner.manifest.checks import is_path
from runner.manifest.load import load_manifest
from runner.plan.sources import repositories
from runner.plan.spec import Download


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_manifest(parser)
    parser.add_argument("--revision", help="of a repository: a branch, tag or commit (default: main)")
    parser.add_argument("--verify", action="store_true", help="read what is here, and fetch again what is damaged")
    parser.add_argument("--json", action="store_true", help="print what happens as lines of JSON")
    parser.epilog = (
        "FILE is a manifest, or a repository as org/name. Branches are asked for anew:\n"
        "what a branch means by now is fetched, and counts from then on for every manifest that names it without a\n"
        "lock. Safetensors and the small files that belong to them are fetched, each checked against the digest that\n"
        "the hub lists; what was cut is gone on from. Private repositories take HF_TOKEN, from the environment or the\n"
        "manifest's env_file.\n\n"
        "example:\n  mlx-run pull configs/prod.yaml\n  mlx-run pull mlx-community/Llama-3.2-1B-Instruct-4bit"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when everything is in the cache. Raises DownloadFailed and ManifestError."""
    wanted, token = _wanted(arguments)
    if not wanted:
        print("Nothing to pull: every source of this manifest is a folder.")
        return 0
    jobs = [Job(d.repo, d.revision, d.kinds, arguments.verify, d.code) for d in wanted]
    with PullView(json=arguments.json) as view:
        try:
            asyncio.run(download(jobs, view.told, token=token))
        except Refused as refused:
            error = download_failed(wanted, refused.failures)
            if arguments.json:
                print_failure(error)
            raise error from None
    return 0


def print_failure(error: DownloadFailed) -> None:
    """The last line of `--json`."""
    found = [diagnostic._asdict() for diagnostic in error.diagnostics]
    print_line({"event": "result", "time": round(time.time(), 3), "ok": False, "diagnostics": found})


def _wanted(arguments: argparse.Namespace) -> tuple[list[Download], str]:
    """What to fetch, and with which token."""
    given = arguments.files or []
    if len(given) == 1 and not Path(given[0]).exists() and is_repository(given[0]):
        return [Download(given[0], arguments.revision or "main", None, (), kinds=())], ""
    if arguments.revision:
        raise UsageError("--revision is of a repository", hint="A manifest says its revisions itself.")
    loaded = load_manifest(manifests(arguments), os.environ)
    return repositories(loaded), loaded.hub_token


def is_repository(text: str) -> bool:
    """Whether a word can only mean a repository."""
    return not is_path(text) and re.search(r"\.ya?ml$", text) is None
