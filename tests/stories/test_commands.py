"""Story: someone watches a runner from other terminals: events, wait, status --watch, plan in a pipeline."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.stories.harness import DEADLINE, Bench

pytestmark = [pytest.mark.story, pytest.mark.mlx]


def test_an_edit_as_other_terminals_see_it(bench: Bench) -> None:
    bench.write({"pirate": "./adapters/pirate"})
    with bench.serving():
        assert bench.run("wait", "dev", "--for", "ready").returncode == 0
        assert bench.run("plan", str(bench.manifest), "--detailed-exitcode").returncode == 0
        with _terminal(bench, "status", "--watch") as (watching, screen), _following(bench) as following:
            _until_drawn(screen, "adapters: pirate")
            assert _next(following, "applied")["generation"] == 1

            bench.write({"pirate": "./adapters/pirate", "loud": "./adapters/shout"})
            assert _next(following, "applied")["generation"] == 2
            assert "generation 2" in _until_drawn(screen, "loud")
            assert bench.ask("What is 17 + 25?", "loud").endswith("!!!")

            pid = bench.model()["pid"]
            os.kill(pid, signal.SIGKILL)
            assert _next(following, "engine_died")["pid"] == pid
            back = bench.run("wait", "--for", "ready", "demo-chat", "--timeout", "30s")
            assert back.returncode == 0, back.stderr
            assert bench.model()["pid"] != pid

            bench.save("name: dev\nmodels: {demo-chat: {sauce: nowhere}}\n")
            assert "sauce" in str(_next(following, "apply_failed")["error"])
            _until_drawn(screen, "The manifest is not in effect")
            failed = bench.run("wait", "--for", "sync", "--timeout", "0.2s")
            assert failed.returncode == 1
            assert "sauce" in failed.stderr
            assert "the manifest is not in effect" in bench.run("events").stdout

            for process in (watching, following):
                process.send_signal(signal.SIGINT)
                assert process.wait(DEADLINE) == 130
            assert "\x1b[?1049l" in _until_drawn(screen, "\x1b[?25h\x1b[?1049l")


def test_a_pipeline_that_only_looks(bench: Bench) -> None:
    bench.write()
    planned = bench.run("plan", str(bench.manifest), "--detailed-exitcode", "--json")
    assert planned.returncode == 2
    assert [a["action"] for a in json.loads(planned.stdout)["actions"]] == ["open", "start"]
    assert bench.run("schema", "--output", "s.json").returncode == 0
    assert "models" in json.loads((bench.folder / "s.json").read_text())["properties"]
    assert bench.run("wait", "--for", "ready", "--timeout", "0.1s").returncode == 1
    assert "mlx-run apply MANIFEST" in bench.run("events").stderr


@contextmanager
def _following(bench: Bench) -> Iterator["subprocess.Popen[str]"]:
    """`mlx-run events -f --json`, ended whatever happens."""
    command = [sys.executable, "-m", "runner.cli.main", "events", "-f", "--json"]
    with subprocess.Popen(
        command, env=bench.environment, cwd=bench.folder, text=True, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _next(following: "subprocess.Popen[str]", name: str) -> dict[str, object]:
    """The next event of that name; the ones before it are passed over."""
    assert following.stdout is not None
    for line in following.stdout:
        event: dict[str, object] = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"events ended before {name!r}")


@contextmanager
def _terminal(bench: Bench, *arguments: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A command on a terminal of its own, and what that terminal shows; ended whatever happens."""
    screen, inner = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "runner.cli.main", *arguments],
        env=bench.environment, cwd=bench.folder, stdin=inner, stdout=inner, stderr=inner,
    ) as process:  # fmt: skip
        try:
            yield process, screen
        finally:
            process.kill()
            os.close(inner)
            os.close(screen)


def _until_drawn(screen: int, text: str) -> str:
    """What a terminal gets, up to where `text` is in it."""
    got, end = b"", time.monotonic() + 20
    while text.encode() not in got:
        readable, _, _ = select.select([screen], [], [], max(end - time.monotonic(), 0))
        assert readable, f"{text!r} was not drawn; at the end there is {got[-2000:]!r}"
        got += os.read(screen, 65536)
    return got.decode()
