"""`mlx-run events`: what happened to a runner, and what happens. Imports the standard library only."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Final

from runner.cli.locate import add_files, add_name, find, wanted
from runner.cli.text import format_bytes
from runner.control import client

Event = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_name(parser, positional=True)
    add_files(parser, short=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C or the runner has stopped")
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    parser.epilog = "The last 500 are kept while a runner is up.\n\nexample:\n  mlx-run events -f"


def run(arguments: argparse.Namespace) -> int:
    """0; raises NotRunning when no runner is up or it went away."""
    show = json.dumps if arguments.json else render
    for reply in client.stream(find(wanted(arguments)).control_socket, "events", follow=arguments.follow):
        if "event" in reply:
            print(show(reply), flush=True)
    return 0


def render(event: Event) -> str:
    """An event in words: local time, what it is about, what happened. Further lines are indented."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    words = _WORDS.get(event["event"], _plain)(event)
    return f"{when}  {event.get('target', 'runner')}: {words}".replace("\n", "\n    ")


def _planned(event: Event) -> str:
    actions = [f"{action['action']} {action['target']}" for action in event["plan"]["actions"]]
    return f"planned {len(actions)} to do: {', '.join(actions)}"


def _restored(event: Event) -> str:
    return f", which is {event['restores']} again" if event["restores"] else ""


def _said(message: str) -> str:
    return f": {message}" if message else ""


def _share(event: Event) -> str:
    done, total = event["done_bytes"], event["total_bytes"]
    return f"{format_bytes(done)} of {format_bytes(total)} are here"


def _backstop(event: Event) -> str:
    if event["kind"] == "cgroup":
        return f"the kernel holds each engine to a hard limit, by a control group in {event['path']}"
    return f"no hard limit for engines by the kernel: {event['reason']}"


def _short(event: Event) -> str:
    return f"needs {format_bytes(event['needed'])}, and the machine has {format_bytes(event['available'])} left"


def _plain(event: Event) -> str:
    """An event that has no words of its own: its name, and its fields."""
    fields = [f"{k}={v}" for k, v in event.items() if k not in ("event", "time", "target")]
    return " ".join([event["event"].replace("_", " "), *fields])


_WORDS: Final[dict[str, Callable[[Event], str]]] = {
    "memory_backstop": _backstop,
    "memory_short": lambda e: f"{_short(e)}: loading it all the same, as planned",
    "planned": _planned,
    "unchanged": lambda e: f"nothing to do, generation {e['generation']} is what the manifest says",
    "warned": lambda e: "warning: " + "\n".join(e["warnings"]),
    "listening": lambda e: f"listening at {e['address']}",
    "downloading": lambda e: f"downloading {e['repo']} at {e['revision']}",
    "converting": lambda e: f"quantising the source, {e['percent']} % written",
    "converted": lambda e: f"the quantised copy was made in {e['seconds']:.2f} s",
    "download_progress": lambda e: f"{e['repo']}: {_share(e)}",
    "downloaded": lambda e: (
        f"downloaded {e['repo']} at {e['revision']}: {format_bytes(e['bytes'])}, commit {e['commit']}"
    ),
    "action_started": lambda e: f"{e['action']} began: {e['reason']}",
    "action_done": lambda e: f"{e['action']} done in {e['seconds']:.2f} s ({e['disruption']})",
    "applied": lambda e: f"generation {e['generation']} is live{_restored(e)}",
    "rolling_back": lambda e: f"going back to generation {e['restores']} ({e['user']})",
    "rollback_failed": lambda e: f"not gone back to generation {e['restores']}, what ran goes on:\n{e['error']}",
    "changing": lambda e: f"changing by {e['user']}; then beside the manifest: {', '.join(e['changes']) or 'nothing'}",
    "change_failed": lambda e: f"not changed, what ran goes on:\n{e['error']}",
    "held": lambda e: f"the manifest was not edited since the rollback to {e['restores']}, which goes on",
    "left_out": lambda e: f"{e['scope']} left out: {', '.join(e['actions'])}",
    "apply_failed": lambda e: f"the manifest is not in effect, what ran goes on:\n{e['error']}",
    "listener_lost": lambda e: f"could not be opened again, and is tried until it can:\n{e['error']}",
    "source_changed": lambda e: f"planned again, because {e['error']}",
    "loading": lambda _: "loading, because a request asks for it",
    "loaded": lambda e: f"loaded in {e['seconds']:.2f} s",
    "load_failed": lambda e: f"could not be loaded:\n{e['error']}",
    "unloaded": lambda e: f"unloaded: {e['reason']}",
    "evicted": lambda e: f"gives way, because {e['reason']}",
    "engine_over_memory": lambda e: f"used {e['used']:,} bytes of {e['limit']:,}, and starts again",
    "engine_out_of_memory": lambda e: f"ended for lack of memory: {e['reason']}",
    "engine_died": lambda e: f"the engine (pid {e['pid']}) ended unexpectedly",
    "engine_backoff": lambda e: f"to be started again in {e['seconds']:.2f} s",
    "engine_restarted": lambda e: f"back, pid {e['pid']}",
    "engine_adopted": lambda e: f"the engine (pid {e['pid']}) was running already and goes on",
    "condition": lambda e: f"{e['condition']} is {e['status']} ({e['reason']}){_said(e['message'])}",
    "stopping": lambda e: f"draining for at most {e['drain_seconds']:.0f} s",
    "stopping_now": lambda e: "stopping at once",
    "stopped": lambda e: "stopped",
}
