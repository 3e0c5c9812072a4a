"""`mlx-run bench` as it is run, on a real engine with a real model."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from runner.cli.main import main
from tests.stories.harness import Bench, until


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("bench"))
    bench.write()
    with bench.serving():
        bench.ask("Hello", max_tokens=1)  # a counter has no value before its first request
        yield bench
    bench.close()


SMALL = ["--prompt-tokens", "64", "--max-tokens", "8", "--temperature", "1", "--top-p", "0.9"]


@pytest.mark.mlx
def test_figures_are_those_of_the_server(serving: Bench) -> None:
    before = serving.metric("mlx_run_completion_tokens_total")
    result = serving.run(
        "bench", serving.url, "--clients", "1,4", "--requests", "4", "--warm-up", "0", "--json",
        "--adapters", "none,pirate", *SMALL, "--max-tokens", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    (ours,) = figures["servers"]
    assert ours["model"] == "demo-chat"
    levels = ours["levels"]
    assert [(level["clients"], level["requests"], level["failed"]) for level in levels] == [(1, 4, 0), (4, 4, 0)]
    probes = serving.metric("mlx_run_completion_tokens_total") - before - sum(level["tokens"] for level in levels)
    assert 0 < probes <= 8, "a token for each prompt that was tried"
    for level in levels:
        assert level["counted_by"] == "usage"
        assert level["prompt_tokens"] == pytest.approx(64, rel=0.2)
        assert level["cached_tokens"] < 16
        assert 0 < level["ttft"]["p50"] <= level["ttft"]["p99"] <= level["request"]["max"] <= level["seconds"]
        assert level["inter_token"]["count"] > 0
        assert 0 < level["client_cpu"] < 1


@pytest.mark.mlx
def test_beside_another_server(serving: Bench) -> None:
    result = serving.run("bench", serving.url, "--against", f"{serving.url}/v1", "-c", "2", "--requests", "4", *SMALL)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("A http://127.0.0.1")
    table = lines[6 : lines.index("", 6) if "" in lines[6:] else None]  # notes follow, of a busy machine for example
    rows = {line.split()[0]: line.split() for line in table if line[:1] in "AB"}
    assert rows["A"][1:4] == rows["B"][1:4] == ["2", "4", "0"]
    ours, theirs = (float(rows[letter][4].replace(",", "")) for letter in "AB")
    assert float(rows["A/B"][2].rstrip("×")) == pytest.approx(ours / theirs, abs=0.02)


@pytest.mark.mlx
def test_ctrl_c_prints_what_there_is(serving: Bench) -> None:
    command = ["bench", serving.url, "-c", "2,4", "--duration", "1h", "--warm-up", "0", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "runner.cli.main", *command],
        stdout=subprocess.PIPE, text=True, env={**serving.environment, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert process.stdout is not None
    head = [process.stdout.readline() for _ in range(5)]
    assert "clients" in head[-1]
    until(lambda: serving.model()["in_flight"])
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.split()[0] == "2"
    assert "2 clients: interrupted after" in rest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:1"], "does not answer"),
        (["gopher://x"], "is no address"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_prefix_that_leaves_nothing_of_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "x", "--shared-prefix", "256"]) == 64
    assert "--shared-prefix takes the whole prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--clients", "0"],
        ["--clients", "1,x"],
        ["--body", "[]"],
        ["--body", "{"],
        ["--max-tokens", "-1"],
        ["--spread", "1"],
        ["--spread", "x"],
    ],
)
def test_arguments_that_are_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "http://127.0.0.1:1", *arguments])
    assert exit_.value.code == 64
    assert arguments[0] in capsys.readouterr().err


def test_the_load_generator_needs_neither_a_server_nor_a_manifest() -> None:
    code = (
        "import sys, runner.bench.worker\n"
        "heavy = {'pydantic', 'yaml', 'falcon', 'granian', 'rich', 'mlx', 'psutil'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


@pytest.mark.mlx
def test_a_level_that_takes_too_long_ends_with_what_there_is(serving: Bench) -> None:
    arguments = ["-c", "1,2", "--requests", "3", "--warm-up", "0", "--limit", "0.001s", *SMALL]
    result = serving.run("bench", serving.url, *arguments)
    assert result.returncode == 1, result.stderr
    late = re.findall(r"^(.*): [1-3] not finished when the level's time was over", result.stdout, re.MULTILINE)
    assert len(late) == 2, result.stdout  # a machine that is busy enough lets one end between two looks at the time
    assert late[0].endswith("1 client")
    assert late[1].endswith("2 clients")
