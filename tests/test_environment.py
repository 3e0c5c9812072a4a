"""What is added to an engine's environment before MLX is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner import environment

linux_cpu = pytest.mark.skipif(not environment.cpu_backend(), reason="for MLX on the CPU of a Linux machine")


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
def test_a_prepared_environment_lacks_nothing_whoever_starts_it() -> None:
    inherited = {environment.PREPARED: "1.0", "HOME": "/root"}

    prepared = environment.prepared(inherited, 12.5)

    assert prepared["HOME"] == "/root"
    assert prepared["MLX_DISABLE_COMPILE"] == "1"
    assert prepared[environment.PREPARED] == "12.5"
    assert environment.engine_environment(prepared) == {}
