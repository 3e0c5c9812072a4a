"""What an engine adds to its environment before MLX is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.engine import environment

linux_cpu = pytest.mark.skipif(not environment.cpu_backend(), reason="for MLX on the CPU of a Linux machine")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for systems where a process can be bound to cores")
def test_cores_are_those_that_the_process_may_run_on() -> None:
    code = "import os; from runner.engine import environment; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "print(environment.cores())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == 1
    assert environment.cores() == len(os.sched_getaffinity(0))


@linux_cpu
def test_adds_what_a_bare_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_openblas", lambda: "/lib/libopenblas.so.0")

    added = environment.engine_environment({"LD_PRELOAD": "/lib/other.so"})

    assert added["MLX_DISABLE_COMPILE"] == "1"
    assert added["LD_PRELOAD"] == "/lib/libopenblas.so.0:/lib/other.so"
    assert int(added["OPENBLAS_NUM_THREADS"]) >= 1


@linux_cpu
def test_leaves_alone_what_the_user_has_set() -> None:
    environ = {"MLX_DISABLE_COMPILE": "0", "LD_PRELOAD": "/opt/libmyblas.so", "OPENBLAS_NUM_THREADS": "3"}
    assert environment.engine_environment(environ) == {}


def test_adds_nothing_twice() -> None:
    assert environment.engine_environment({environment.PREPARED: "1.0"}) == {}


def test_sets_cuda_up_but_for_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cpu_backend", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    added = environment.engine_environment({"MLX_CUDA_GRAPH_CACHE_SIZE": "7"})
    assert added["MLX_ENABLE_CACHE_THRASHING_CHECK"] == "0"
    assert "MLX_CUDA_GRAPH_CACHE_SIZE" not in added
    assert environment.cpu_environment({}) == {}
    assert environment.notes({}) == []


def test_adds_nothing_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert environment.engine_environment({}) == {}


def test_a_cuda_build_is_not_the_cpu_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx", raising=False)
    assert environment.cpu_backend()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    assert not environment.cpu_backend()


@linux_cpu
def test_notes_say_which_blas_runs_or_how_to_get_one() -> None:
    assert environment.notes({"LD_PRELOAD": "/a.so:/lib/libopenblas.so.0"}) == [
        "matrix products use /lib/libopenblas.so.0"
    ]
    (note,) = environment.notes({})
    assert "apt-get install libopenblas0-pthread" in note


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
