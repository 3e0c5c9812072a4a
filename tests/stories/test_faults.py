"""Stories of what goes wrong: engines that die, clients that leave, edits that are broken, Ctrl-C."""

import json
import os
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.stories.demo import LONG, long_answer
from tests.stories.harness import DEADLINE, MODELS, Bench, alive, descendants, until
from tests.stories.traffic import Stream

pytestmark = [pytest.mark.story, pytest.mark.mlx]

OTHER = f"""
  other:
    source: {MODELS / "demo-chat"}
"""


def test_a_killed_engine_fails_its_streams_at_once_and_comes_back(bench: Bench) -> None:
    bench.write(extra=OTHER)
    with bench.serving():
        pid = bench.model()["pid"]
        doomed = [Stream(bench.client(), LONG, "pirate") for _ in range(4)]
        other = [Stream(bench.client(), LONG, "none", model="other") for _ in range(4)]
        for stream in doomed + other:
            stream.start()
        for stream in doomed + other:
            assert stream.first.wait(30)
        os.kill(pid, signal.SIGKILL)
        for stream in doomed:
            stream.join(timeout=5)
            assert not stream.is_alive(), "the error event comes at once"
            assert "the engine died" in stream.answer.error
        # The next request needs no luck: it waits for the engine that is coming back.
        assert bench.ask("What is 17 + 25?")
        for stream in other:
            stream.join()
            assert stream.answer.text == long_answer("base")
        model = bench.model()
        assert model["restarts"] == 1
        assert model["pid"] != pid
        assert model["state"] == "ready"


def test_an_engine_that_keeps_dying_backs_off_and_says_so(bench: Bench) -> None:
    bench.write()
    with bench.serving():
        for _ in range(3):
            os.kill(until(lambda: bench.model()["state"] == "ready" and bench.model()["pid"]), signal.SIGKILL)
            until(lambda: bench.model()["state"] != "ready")
            until(bench.ready)
        assert bench.model()["restarts"] == 3
        log = bench.run("logs", "-n", "dev").stdout
        delays = re.findall(r"engine_backoff target=models.demo-chat seconds=([\d.]+)", log)
        assert delays[:3] == ["0.25", "0.5", "1.0"]


def test_two_hundred_clients_that_leave_at_random_points(bench: Bench) -> None:
    bench.write()
    with bench.serving() as runner:
        engine = psutil.Process(bench.model()["pid"])
        loaded = engine.memory_info().rss
        _leave_early(bench, 100, seed=1)
        until(lambda: _idle(bench))
        before = psutil.Process(runner.pid).memory_info().rss
        _leave_early(bench, 200, seed=2)
        until(lambda: _idle(bench))
        assert psutil.Process(runner.pid).memory_info().rss - before < 4 * 2**20
        # Some 45 MB in which its allocator left room: it gives them back when it rests.
        until(lambda: engine.memory_info().rss - loaded < 12 * 2**20)
        assert bench.ask(LONG) == long_answer("base")


def _idle(bench: Bench) -> bool:
    model = bench.model()
    return model["rows"] == model["in_flight"] == model["waiting"] == 0


def _leave_early(bench: Bench, clients: int, seed: int) -> None:
    choose = random.Random(seed)
    plans = [(choose.choice(["none", "pirate", "shout"]), choose.random() * 8000) for _ in range(clients)]

    def one(plan: tuple[str, float]) -> None:
        adapter, limit = plan
        body = json.dumps(
            {"messages": [{"role": "user", "content": LONG}], "stream": limit > 400, "adapter_name": adapter}
        )
        with socket.create_connection(("127.0.0.1", bench.port), timeout=30) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            read = 0
            while read < limit and limit > 400 and (data := client.recv(512)):
                read += len(data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, plans))


def test_a_broken_edit_keeps_what_runs_and_the_repair_goes_live(bench: Bench) -> None:
    bench.write()
    good = bench.manifest.read_text()
    with bench.serving():
        generation = bench.status()["generation"]
        for damage, place, words in [
            (good.replace("models:", "modles:"), ":4:1", "modles"),
            (good.replace(f"port: {bench.port}", "port: 99999"), ":3:14", "port"),
            (good.replace("./adapters/shout", "./adapters/nowhere"), ":9:14", "nowhere"),
            (good + "  broken: [", ":11:1", "is not YAML"),
        ]:
            bench.save(damage)
            until(lambda: bench.status()["manifest_error"])
            shown = bench.run("status", "dev")
            assert shown.returncode == 3
            assert f"dev.yaml{place}" in shown.stdout
            assert words in shown.stdout
            assert f"generation {generation} goes on" in shown.stdout
            assert bench.ask("What is 17 + 25?", "shout").endswith("!!!")
            bench.save(good)
            until(lambda: bench.status()["in_sync"] and not bench.status()["manifest_error"])
        bench.write({"pirate": "./adapters/pirate", "mended": "./adapters/shout"})
        until(lambda: any(a["name"] == "mended" for a in bench.model()["adapters"]))
        assert bench.ask("What is 17 + 25?", "mended").endswith("!!!")


def test_ctrl_c_lets_streams_finish(bench: Bench) -> None:
    bench.write()
    with bench.serving() as runner:
        stream = Stream(bench.client(), LONG)
        stream.start()
        assert stream.first.wait(30)
        runner.send_signal(signal.SIGINT)
        output, _ = runner.communicate(timeout=DEADLINE)
        stream.join()
        assert stream.answer.error == ""
        assert stream.answer.text == long_answer("base")
        assert runner.returncode == 0
        assert "Draining" in output
        assert "Traceback" not in output


def test_ctrl_c_twice_stops_at_once(bench: Bench) -> None:
    bench.write(model_extra="    batching: {max_rows: 1}\n")
    with bench.serving() as runner:
        streams = [Stream(bench.client(), LONG) for _ in range(8)]
        for stream in streams:
            stream.start()
        until(lambda: bench.model()["in_flight"] == 8)
        began = time.monotonic()
        runner.send_signal(signal.SIGINT)
        assert runner.stdout is not None
        until(lambda: "Draining" in runner.stdout.readline())  # type: ignore[union-attr]
        runner.send_signal(signal.SIGINT)
        runner.communicate(timeout=DEADLINE)
        for stream in streams:
            stream.join()
        assert any(s.answer.error for s in streams), "some were cut"
        assert time.monotonic() - began < 10


def test_engines_end_with_a_killed_runner_and_the_next_one_starts_clean(bench: Bench) -> None:
    bench.write()
    with bench.serving() as runner:
        engines = descendants(runner.pid)
        assert engines
        runner.kill()
        runner.wait()
        until(lambda: not any(alive(pid) for pid in engines))
    with bench.serving():
        assert bench.ask("What is 17 + 25?")


def test_a_runner_that_is_killed_and_started_again_loads_nothing(bench: Bench) -> None:
    bench.environment["MLX_RUN_ORPHAN_GRACE"] = "20"
    bench.write()
    with bench.serving() as runner:
        before = bench.model()
        stream = Stream(bench.client(), LONG)
        stream.start()
        assert stream.first.wait(30)
        runner.kill()
        runner.wait()
        stream.join()
        assert stream.answer.error
        bench.write({"pirate": "./adapters/pirate"})
        with bench.serving():
            after = bench.model()
            assert after["pid"] == before["pid"]
            assert after["loaded_at"] == pytest.approx(before["loaded_at"], abs=1)
            assert [a["name"] for a in after["adapters"]] == ["pirate"]
            assert after["in_flight"] == after["rows"] == 0
            assert bench.ask(LONG, "pirate") == long_answer("pirate")


def test_a_port_that_is_taken_is_named(bench: Bench) -> None:
    bench.write()
    with socket.create_server(("127.0.0.1", bench.port)):
        results = [bench.run("apply", *options, str(bench.manifest)) for options in ([], ["-d"])]
    for result in results:
        assert result.returncode == 1
        assert f"127.0.0.1:{bench.port}" in result.stderr
        assert "another process listens there" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_request_during_the_load_waits_for_it(bench: Bench) -> None:
    bench.write()
    process = bench.start()
    answers: list[str] = []

    def early() -> None:
        answers.append(bench.ask("What is 17 + 25?"))

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", bench.port)) == 0

    try:
        until(listening)
        threads = [threading.Thread(target=early) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 8
        assert len(set(answers)) == 1
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE)
