"""What there is of memory, in a container too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from runner import machine
from runner.machine import Confine, available_memory, confines, machine_memory

MIB = 2**20
WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_in_a_container(tmp_path: Path) -> None:
    group(tmp_path, memory__max=f"{800 * MIB}\n", memory__current=f"{300 * MIB}\n")
    group(tmp_path, memory__stat=f"anon 5\nfile 7\ninactive_file {100 * MIB}\n")
    group(tmp_path / "mlx-run-runner", memory__max="max\n", memory__current="5\n")
    (tmp_path / "cgroup").write_text("0::/mlx-run-runner\n")
    assert confines(tmp_path / "cgroup", tmp_path) == [Confine(800 * MIB, 200 * MIB)]


def test_in_one_of_version_1_whose_path_is_that_of_the_host(tmp_path: Path) -> None:
    group(tmp_path / "memory", memory__limit_in_bytes="1000\n", memory__usage_in_bytes="700\n")
    group(tmp_path / "memory", memory__stat="cache 9\ntotal_inactive_file 50\n")
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    assert confines(tmp_path / "cgroup", tmp_path) == [Confine(1000, 650)]


def test_each_group_that_this_one_lies_in_counts(tmp_path: Path) -> None:
    for number, path in enumerate(("a", "a/b", "a/b/c"), start=1):
        group(tmp_path / path, memory__max=str(number * 100), memory__current="10")
    (tmp_path / "cgroup").write_text("0::/a/b/c\n")
    assert [confine.limit for confine in confines(tmp_path / "cgroup", tmp_path)] == [300, 200, 100]


def test_where_there_are_none(tmp_path: Path) -> None:
    assert confines(tmp_path / "none", tmp_path) == []
    group(tmp_path / "a", memory__max="max", memory__current="10")
    (tmp_path / "cgroup").write_text("0::/a\n")
    assert confines(tmp_path / "cgroup", tmp_path) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_backend", lambda: True)
    monkeypatch.setattr(machine, "confines", lambda: [Confine(800 * MIB, 300 * MIB), Confine(1 << 60, 0)])
    assert (machine_memory(), available_memory()) == (800 * MIB, 500 * MIB)
    monkeypatch.setattr(machine, "confines", lambda: [Confine(800 * MIB, 900 * MIB)])
    assert available_memory() == 0
    monkeypatch.setattr(machine, "cpu_backend", lambda: False)  # models are on a GPU
    assert machine_memory() == WHOLE
    assert available_memory() > 0


def test_mlx_is_found_behind_what_is_only_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's CUDA build writes to /tmp/mlx, and /tmp is where a script's own folder comes first on the path."""
    scratch, site = tmp_path / "scratch", tmp_path / "site"
    (scratch / "mlx" / "0.32.4" / "ptx").mkdir(parents=True)
    (site / "mlx").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(scratch), str(site)])
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx"]:
        monkeypatch.delitem(sys.modules, name)
    assert (machine.cpu_backend(), machine.mlx_version()) == (True, "")
    (site / "mlx-0.32.4.dist-info").mkdir()
    assert (machine.cpu_backend(), machine.mlx_version()) == (True, "0.32.4")
    (site / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    assert not machine.cpu_backend()
