"""What an engine makes of its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.engine import environment
from runner.machine import cpu_backend
from tests.engine.tiny import build_tokenizer

linux_cpu = pytest.mark.skipif(not cpu_backend(), reason="for MLX on the CPU of a Linux machine")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for systems where a process can be bound to cores")
def test_cores_are_those_that_the_process_may_run_on() -> None:
    code = "import os; from runner.engine import environment; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "print(environment.cores())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == 1
    assert environment.cores() == len(os.sched_getaffinity(0))


@linux_cpu
def test_notes_say_which_blas_runs_and_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert environment.notes({"LD_PRELOAD": "/a.so:/lib/libopenblas.so.0:/lib/libjemalloc.so.2"}) == [
        "matrix products use /lib/libopenblas.so.0"
    ]
    blas, allocator = environment.notes({})
    assert "apt-get install libopenblas0-pthread" in blas
    assert "apt-get install libjemalloc2" in allocator
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert environment.notes({}) == [blas]


@linux_cpu
def test_a_process_restarts_itself_once_with_its_arguments() -> None:
    script = (
        "import os, sys\n"
        "from runner.engine import environment\n"
        "print(environment.restart_if_needed(12.5), sys.argv[1:], os.environ['MLX_DISABLE_COMPILE'])\n"
    )
    environ = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, "--spec", "a b"]
    output = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=True)
    assert output.stdout.split("\n")[0] == "12.5 ['--spec', 'a b'] 1"


def test_where_mlx_has_a_gpu_only_an_allocator_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cpu_backend", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sys.platform", "linux")
    (allocator,) = environment.notes({})
    assert "apt-get install libjemalloc2" in allocator
    assert environment.notes({"LD_PRELOAD": "/lib/libjemalloc.so.2"}) == []
    monkeypatch.setattr("sys.platform", "darwin")
    assert environment.notes({}) == []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="for systems that list a process's threads")
@pytest.mark.parametrize("own", [None, "true"])
def test_a_text_is_tokenised_without_a_pool_of_threads(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user wants one, which tells that threads are counted rightly here."""
    build_tokenizer(tmp_path)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from runner.engine.environment import tokenise_in_one_thread\n"
        "from runner.engine.narrow import narrow_tokenizer\n"
        "tokenise_in_one_thread()\n"
        "tokenizer, _ = narrow_tokenizer(Path(sys.argv[1]), {'model_type': 'llama'}, frozenset())\n"
        "assert tokenizer.encode_prompt('hello there')\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if own is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", own)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAYON_NUM_THREADS": "3"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=True).stdout
    assert int(output) == (1 if own is None else 4)
