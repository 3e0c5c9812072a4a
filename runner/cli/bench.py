"""`mlx-run bench`: streaming clients against any OpenAI endpoint, beside another one where that is asked for."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from runner.bench.job import target_of
from runner.bench.run import Measured, Settings, Subject, calibrate, find_model, measure
from runner.bench.workers import Workers
from runner.cli.bench_table import Table, as_json
from runner.cli.text import duration
from runner.errors import UsageError

_EPILOG = """\
Each client sends its next request when its last answer has ended. Prompts are words drawn from the seed, no two alike,
so that no prefix cache helps unless --shared-prefix is given. Tokens are the server's own count where it gives usage in
streams, and events with content where it does not. TTFT is from sending a request to the first content; inter-token is
every gap between two events with content.

0 when every request was answered, 1 when some failed or did not finish within --limit, 130 after a Ctrl-C, which
prints what there is.

example:
  mlx-run bench http://127.0.0.1:8080
  mlx-run bench http://127.0.0.1:8080 --clients 1,8,32
  mlx-run bench http://127.0.0.1:8080 --model chat --adapters none,pirate,shout
  mlx-run bench http://127.0.0.1:8080 --against http://127.0.0.1:9090 --json > figures.json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("url", metavar="URL", help="the server, with or without /v1")
    parser.add_argument("-m", "--model", default="", help="the model's id (default: the first that the server lists)")
    parser.add_argument("--against", metavar="URL2", help="a second server: both are measured, in turn at each level")
    parser.add_argument("--against-model", default="", metavar="MODEL", help="the second server's model")
    parser.add_argument("--api-key", default=os.environ.get("MLX_RUN_API_KEY", ""), help="default: $MLX_RUN_API_KEY")
    parser.add_argument("--against-api-key", default="", metavar="KEY", help="the second server's API key")
    level = parser.add_argument_group("how much")
    level.add_argument(
        "-c", "--clients", type=_counts, default=(1, 8, 32, 128), metavar="N,N,…", help="levels (default: 1,8,32,128)"
    )
    size = level.add_mutually_exclusive_group()
    size.add_argument("--requests", type=_count, metavar="N", help="a level (default: two a client, 8 or more)")
    size.add_argument("--duration", type=duration, metavar="30s", help="begin new requests for so long, instead")
    level.add_argument("--repeat", type=_count, default=1, metavar="N", help="repetitions of each level (default: 1)")
    level.add_argument(
        "--warm-up", type=_count_or_none, metavar="N", help="short requests before each level (default: one a client)"
    )
    level.add_argument("--timeout", type=duration, default=300.0, metavar="5m", help="for one request (default: 5m)")
    level.add_argument(
        "--limit", type=duration, metavar="2m", help="for one level: what is not answered by then counts as unfinished"
    )
    level.add_argument("--processes", type=_count, metavar="N", help="processes of clients (default: by their number)")
    _configure_requests(parser.add_argument_group("requests"))
    parser.add_argument("--json", action="store_true", help="print everything as JSON at the end")
    parser.epilog = _EPILOG


def _configure_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt-tokens", type=_count, default=256, metavar="N", help="length (default: 256)")
    group.add_argument(
        "--shared-prefix", type=_count_or_none, default=0, metavar="N", help="of these, tokens that all prompts share"
    )
    group.add_argument("--max-tokens", type=_count, default=128, metavar="N", help="new tokens (default: 128)")
    group.add_argument(
        "--spread",
        type=_share,
        default=0.0,
        metavar="S",
        help="answers' lengths differ by up to this share (default: 0)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    group.add_argument("--top-p", type=float, metavar="P", help="default: the server's")
    group.add_argument("--adapters", type=_names, default=(), metavar="A,B,…", help="taken in turn; none: plain model")
    group.add_argument(
        "--adapter-field", default="adapter_name", metavar="FIELD", help="the field that names one: adapter_name, model"
    )
    group.add_argument("--body", type=_object, default={}, metavar="JSON", help="further fields of each request")
    group.add_argument("--seed", type=int, help="for the same prompts as another run (default: drawn)")


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when requests failed or were not finished. Raises RunnerError when a server does not answer at all."""
    settings = _settings(arguments)
    targets = [target_of(arguments.url, api_key=arguments.api_key, model=arguments.model)]
    if arguments.against:
        key = arguments.against_api_key or arguments.api_key
        targets.append(target_of(arguments.against, api_key=key, model=arguments.against_model))
    found: list[Measured] = []
    subjects: list[Subject] = []
    with Workers(max(map(settings.processes_at, settings.clients))) as workers:
        interrupted = _on_interrupt(workers.stop)
        subjects += [calibrate(workers, find_model(t), settings, arguments.adapters) for t in targets]
        table = None if arguments.json else Table(subjects, settings)
        for measured in measure(workers, subjects, settings):
            found.append(measured)
            if table is not None:
                table.add(measured)
    if arguments.json:
        json.dump(as_json(subjects, settings, found), sys.stdout, indent=2)
        print()
    elif table is not None:
        table.close()
    if interrupted():
        return 130
    return 1 if any(measured.level.failed or measured.level.unfinished for measured in found) else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    body: dict[str, Any] = {**arguments.body}
    for name in ("temperature", "top_p"):
        if getattr(arguments, name) is not None:
            body[name] = getattr(arguments, name)
    if arguments.shared_prefix and arguments.shared_prefix >= arguments.prompt_tokens:
        raise UsageError("--shared-prefix takes the whole prompt", hint="It must be less than --prompt-tokens.")
    return Settings(
        clients=arguments.clients,
        requests=arguments.requests,
        duration=arguments.duration,
        limit=arguments.limit,
        prompt_tokens=arguments.prompt_tokens,
        shared_prefix=arguments.shared_prefix,
        max_tokens=arguments.max_tokens,
        spread=arguments.spread,
        body=body,
        adapter_field=arguments.adapter_field,
        seed=random.randrange(1_000_000) if arguments.seed is None else arguments.seed,
        timeout=arguments.timeout,
        repeat=arguments.repeat,
        warm_up=arguments.warm_up,
        processes=arguments.processes,
    )


def _on_interrupt(stop: Callable[[], None]) -> Callable[[], bool]:
    """The first Ctrl-C calls `stop`, a second one is a KeyboardInterrupt. Returns what tells whether there was one."""
    seen = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        stop()

    signal.signal(signal.SIGINT, handle)
    return lambda: seen


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return share


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple("" if name.strip() == "none" else name.strip() for name in text.split(","))


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
