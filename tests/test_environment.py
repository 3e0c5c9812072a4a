"""What is added to an engine's environment before MLX is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from runner import environment

linux_cpu = pytest.mark.skipif(not environment.cpu_backend(), reason="for MLX on the CPU of a Linux machine")


@linux_cpu
def test_adds_what_a_bare_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_openblas", lambda: "/lib/libopenblas.so.0")
    monkeypatch.setattr(environment, "find_allocator", lambda: "/lib/libjemalloc.so.2")

    added = environment.engine_environment({"LD_PRELOAD": "/lib/other.so"})

    assert added["MLX_DISABLE_COMPILE"] == "1"
    assert added["LD_PRELOAD"] == "/lib/libopenblas.so.0:/lib/libjemalloc.so.2:/lib/other.so"
    assert int(added["OPENBLAS_NUM_THREADS"]) >= 1


@linux_cpu
@pytest.mark.parametrize(
    ("present", "expected"),
    [("/opt/libopenblas.so", "/lib/libjemalloc.so.2:/opt/libopenblas.so"), ("/opt/libtcmalloc.so", None)],
)
def test_adds_one_of_a_kind(present: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_openblas", lambda: None)
    monkeypatch.setattr(environment, "find_allocator", lambda: "/lib/libjemalloc.so.2")
    assert environment.engine_environment({"LD_PRELOAD": present}).get("LD_PRELOAD") == expected


@linux_cpu
def test_an_allocator_is_taken_where_it_is_known_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(name: str) -> os.uname_result:
        return os.uname_result(("Linux", "", "", "", name))

    monkeypatch.setattr(Path, "exists", lambda path: path.name == "libjemalloc.so.2")
    monkeypatch.setattr(os, "uname", lambda: machine("x86_64"))
    assert environment.find_allocator() == "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
    monkeypatch.setattr(os, "uname", lambda: machine("aarch64"))
    assert environment.find_allocator() is None


@linux_cpu
def test_names_the_kernels_of_an_openblas_that_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_openblas", lambda: "/lib/libopenblas.so.0")
    monkeypatch.setattr(environment, "openblas_kernels", lambda: "HASWELL")
    assert environment.engine_environment({})["OPENBLAS_CORETYPE"] == "HASWELL"
    assert "OPENBLAS_CORETYPE" not in environment.engine_environment({"OPENBLAS_CORETYPE": "ZEN"})
    assert "OPENBLAS_CORETYPE" not in environment.engine_environment({"LD_PRELOAD": "/opt/libopenblas.so"})


_AVX512 = "avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        (f"fpu fma sse3 avx avx2 {_AVX512} avx512_bf16", "SKYLAKEX"),
        ("fpu fma avx2 avx512f avx512cd avx512er avx512pf", "HASWELL"),
        ("fpu fma sse3 avx avx2 avx_vnni", "HASWELL"),
        ("fpu sse3 avx", None),
    ],
)
def test_kernels_are_what_the_processor_can_do(flags: str, kernels: str | None, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: A\nflags\t\t: {flags}\nvmx flags\t: avx512f\n")
    assert environment.openblas_kernels(cpuinfo) == kernels


def test_without_such_a_list_openblas_knows_by_itself(tmp_path: Path) -> None:
    assert environment.openblas_kernels(tmp_path / "cpuinfo") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert environment.openblas_kernels(tmp_path / "cpuinfo") is None


@linux_cpu
def test_leaves_alone_what_the_user_has_set() -> None:
    libraries = "/opt/libmyblas.so /opt/libmimalloc.so"
    environ = {"MLX_DISABLE_COMPILE": "0", "LD_PRELOAD": libraries, "OPENBLAS_NUM_THREADS": "3"}
    assert environment.engine_environment(environ) == {}


def test_adds_nothing_twice() -> None:
    assert environment.engine_environment({environment.PREPARED: "1.0"}) == {}


def test_sets_cuda_up_but_for_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cpu_backend", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environment, "find_allocator", lambda: "/lib/libjemalloc.so.2")
    added = environment.engine_environment({"MLX_CUDA_GRAPH_CACHE_SIZE": "7", "LD_PRELOAD": "/lib/other.so"})
    assert added["MLX_ENABLE_CACHE_THRASHING_CHECK"] == "0"
    assert "MLX_CUDA_GRAPH_CACHE_SIZE" not in added
    assert added["LD_PRELOAD"] == "/lib/libjemalloc.so.2:/lib/other.so"
    assert "LD_PRELOAD" not in environment.engine_environment({"LD_PRELOAD": "/opt/libtcmalloc.so"})
    assert environment.engine_environment({})["LD_PRELOAD"] == "/lib/libjemalloc.so.2"
    monkeypatch.setattr(environment, "find_allocator", lambda: None)
    assert "LD_PRELOAD" not in environment.engine_environment({})
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
