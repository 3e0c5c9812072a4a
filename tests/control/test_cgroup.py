"""Where control groups may be made, and what is left as it is: on files that behave as the kernel's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from runner.control.backstop import Backstop, hard_limit
from runner.control.bounds import Bounds
from runner.control.cgroup import Ground, Group, NoGroup, ground, prepare
from runner.control.state_folder import StateFolder
from runner.protocol import EngineSpec
from tests.control.kernel import Kernel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are a thing of Linux")
MIB = 2**20
HOME = "user.slice/user@1000.service"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    try:
        os.setxattr(tmp_path, "user.delegate", b"0")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    return Kernel(tmp_path, monkeypatch)


def test_a_service_with_a_group_for_its_runner(kernel: Kernel) -> None:
    unit = kernel.group("app.slice/mlx-run-dev.service", "memory", delegated="user.delegate")
    kernel.group("app.slice/mlx-run-dev.service/runner", "", pids=[500])
    kernel.runs_in("/app.slice/mlx-run-dev.service/runner")
    found = ground(kernel.proc)
    assert found == Ground(unit, None)
    prepare(found, kernel.proc)
    assert (unit / "cgroup.subtree_control").read_text() == "memory"


def test_a_service_without_one_is_left_alone_for_it_could_not_be_started_again(kernel: Kernel) -> None:
    unit = kernel.group("app.slice/mlx-run-dev.service", "memory", pids=[500], delegated="user.delegate")
    kernel.runs_in("/app.slice/mlx-run-dev.service")
    with pytest.raises(NoGroup, match="DelegateSubgroup"):
        ground(kernel.proc)
    assert Kernel.pids(unit) == [500]


@pytest.mark.parametrize("own", [f"{HOME}/tmux.scope", f"{HOME}/app.slice/term.scope", "user.slice/session-3.scope"])
def test_what_is_systemds_or_the_users_own_is_left_alone(own: str, kernel: Kernel) -> None:
    kernel.group(HOME, "memory", delegated="user.delegate")  # to the user's systemd, not to what it starts
    kernel.group(own, "memory", pids=[400, 500])
    kernel.runs_in(f"/{own}")
    with pytest.raises(NoGroup, match="not delegated"):
        ground(kernel.proc)


def test_in_a_scope_that_is_delegated_the_runner_makes_way(kernel: Kernel) -> None:
    scope = kernel.group("app.slice/run-1.scope", "cpu memory", pids=[400, 500, 501], delegated="trusted.delegate")
    kernel.process(501, 500)
    kernel.runs_in("/app.slice/run-1.scope")
    found = ground(kernel.proc)
    prepare(found, kernel.proc)
    assert (Kernel.pids(scope), (scope / "cgroup.subtree_control").read_text()) == ([], "memory")
    assert Kernel.pids(scope / "mlx-run-runner") == [400, 500, 501]
    kernel.runs_in("/app.slice/run-1.scope/mlx-run-runner")
    assert ground(kernel.proc) == Ground(scope, None), "and a second runner finds it done"


def test_in_a_container(kernel: Kernel) -> None:
    container = kernel.group("", "cpu memory", pids=[1, 77, 500])
    kernel.process(77, 1)  # what the container's own script started beside the runner
    (container / "cgroup.type").write_text("domain\n")  # a namespace's top is not the tree's root
    kernel.runs_in("/")
    prepare(ground(kernel.proc), kernel.proc)
    assert Kernel.pids(container / "mlx-run-runner") == [1, 77, 500]


def test_in_a_container_with_a_process_from_outside(kernel: Kernel) -> None:
    container = kernel.group("", "cpu memory", pids=[1, 0, 500])
    (container / "cgroup.type").write_text("domain\n")
    kernel.runs_in("/")
    with pytest.raises(NoGroup, match="not ours"):
        prepare(ground(kernel.proc), kernel.proc)
    assert sorted(Kernel.pids(container)) == [0, 1, 500]


@pytest.mark.parametrize("stranger", [77, 0])
def test_processes_of_others_are_not_moved(stranger: int, kernel: Kernel) -> None:
    scope = kernel.group("run-1.scope", "memory", pids=[500, stranger], delegated="user.delegate")
    if stranger:
        kernel.process(stranger, 1)
    kernel.runs_in("/run-1.scope")
    with pytest.raises(NoGroup, match="not ours"):
        prepare(ground(kernel.proc), kernel.proc)
    assert Kernel.pids(scope) == [500, stranger]
    assert not (scope / "mlx-run-runner").exists()


def test_what_was_moved_goes_back_where_the_kernel_refuses(kernel: Kernel) -> None:
    scope = kernel.group("run-1.scope", "memory", pids=[400, 500], delegated="user.delegate")
    kernel.refuses.add(scope / "cgroup.subtree_control")
    kernel.runs_in("/run-1.scope")
    with pytest.raises(NoGroup, match="Invalid argument"):
        prepare(ground(kernel.proc), kernel.proc)
    assert Kernel.pids(scope) == [400, 500]
    assert not (scope / "mlx-run-runner").exists()


def test_why_there_are_none(kernel: Kernel) -> None:
    kernel.group("run-1.scope", "cpu", pids=[500], delegated="user.delegate")
    kernel.runs_in("/run-1.scope")
    with pytest.raises(NoGroup, match="memory controller is not handed down"):
        ground(kernel.proc)
    kernel.runs_in("/../other", root="/")
    with pytest.raises(NoGroup, match="outside of its container"):
        ground(kernel.proc)
    kernel.runs_in("/run-1.scope", root="/pods/a")
    with pytest.raises(NoGroup, match="not under what is mounted"):
        ground(kernel.proc)
    (kernel.proc / "self/mountinfo").write_text("35 31 0:32 / /cgroup/memory rw - cgroup cgroup rw,memory\n")
    with pytest.raises(NoGroup, match="no cgroup v2"):
        ground(kernel.proc)


@pytest.fixture
def backstop(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backstop:
    kernel.group("run-1.scope", "memory", delegated="user.delegate")
    kernel.group("run-1.scope/mlx-run-runner", "", pids=[500])
    kernel.runs_in("/run-1.scope/mlx-run-runner")
    monkeypatch.setattr("runner.control.backstop.ground", lambda: ground(kernel.proc))
    monkeypatch.setattr("runner.control.backstop.cpu_backend", lambda: True)
    made = Backstop(StateFolder(tmp_path / "state", "dev"), wanted=True)
    assert made.open()["kind"] == "cgroup"
    return made


def spec(**fields: int) -> EngineSpec:
    return EngineSpec(model="chat", path="/models/chat", digest="x", **fields)


def test_the_limit_follows_the_engine(backstop: Backstop) -> None:
    bounds = Bounds(backstop)
    group = Path(bounds.enclose("ab12cd34", spec(budget_bytes=400 * MIB, memory_limit_bytes=1000 * MIB)))

    def limit() -> int:
        return int((group / "memory.max").read_text())

    assert limit() == hard_limit(400 * MIB) > 1.25 * 400 * MIB
    assert (group / "memory.oom.group").read_text() == "1"
    bounds.told(800 * MIB)
    assert limit() == hard_limit(800 * MIB), "more is allowed before the engine takes it"
    bounds.kept_to(400 * MIB)
    assert limit() == hard_limit(800 * MIB), "that was said before it was told"
    bounds.told(200 * MIB)
    assert limit() == hard_limit(800 * MIB), "it has to give back first"
    bounds.kept_to(200 * MIB)
    assert limit() == hard_limit(200 * MIB)
    bounds.told(5000 * MIB)
    assert limit() == hard_limit(1000 * MIB), "its own limit goes on"


def test_without_a_limit_there_is_none(backstop: Backstop) -> None:
    bounds = Bounds(backstop)
    group = Path(bounds.enclose("ab12cd34", spec()))
    assert (group / "memory.max").read_text() == ""
    bounds.kept_to(100 * MIB)
    assert (group / "memory.max").read_text() == str(hard_limit(100 * MIB))
    bounds.told(0)
    assert (group / "memory.max").read_text() == "max"


def test_what_the_kernel_did_is_said(backstop: Backstop) -> None:
    bounds = Bounds(backstop)
    group = Path(bounds.enclose("ab12cd34", spec(budget_bytes=100 * MIB)))
    assert bounds.broken == ""
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 0\noom_kill 1\noom_group_kill 0\n")
    assert "the machine" in bounds.broken
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 1\n")
    assert f"it reached {hard_limit(100 * MIB):,} bytes" in bounds.broken


def test_only_an_engine_that_is_in_its_group_is_said_to_be_bounded(backstop: Backstop) -> None:
    bounds = Bounds(backstop)
    group = Path(bounds.enclose("ab12cd34", spec(budget_bytes=100 * MIB)))
    assert bounds.limit_of(77) == 0
    (group / "cgroup.procs").write_text("77\n")
    assert bounds.limit_of(77) == hard_limit(100 * MIB)
    assert (bounds.limit_of(None), bounds.limit_of(7)) == (0, 0)


def test_a_group_goes_when_its_engine_has_and_not_before(backstop: Backstop) -> None:
    bounds, other = Bounds(backstop), Bounds(backstop)
    group = Path(bounds.enclose("ab12cd34", spec()))
    beside = Path(other.enclose("00000000", spec()))  # its engine has yet to enter it
    (group / "cgroup.procs").write_text("77\n")
    bounds.release()
    assert group.exists(), "a process is in it"
    (group / "cgroup.procs").write_text("")
    other.enclose("11111111", spec())
    assert (group.exists(), beside.exists()) == (False, True)


async def test_what_a_killed_runner_left_is_found_wherever_the_next_one_runs(
    backstop: Backstop, kernel: Kernel, tmp_path: Path
) -> None:
    left, lives = (Path(Bounds(backstop).enclose(name, spec(budget_bytes=MIB))) for name in ("ab12cd34", "00000000"))
    (lives / "cgroup.procs").write_text("77\n")
    kernel.group("term.scope", "memory", pids=[500])
    kernel.runs_in("/term.scope")
    later = Backstop(StateFolder(tmp_path / "state", "dev"), wanted=True)
    assert later.open()["kind"] == "oom_score_adj"
    assert (left.exists(), lives.exists()) == (False, True)
    bounds = Bounds(later)
    bounds.found("00000000", spec())
    bounds.told(10 * MIB)
    bounds.kept_to(10 * MIB)
    assert bounds.limit_of(77) == hard_limit(10 * MIB)
    (lives / "cgroup.procs").write_text("")
    bounds.release()
    await later.close()
    assert not lives.exists()
    assert later.enclose("22222222", 0) is None


def test_a_damaged_record_removes_nothing_else(backstop: Backstop, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    for name, text in (("ab12cd34", str(precious)), ("00000000", ""), ("11111111", "\udcff\x00")):
        (tmp_path / f"state/dev/e/{name}.group").write_bytes(text.encode("utf-8", "surrogateescape"))
    backstop.release("22222222")
    assert precious.exists()
    assert not list((tmp_path / "state/dev/e").glob("*.group"))


def test_turned_off(tmp_path: Path) -> None:
    made = Backstop(StateFolder(tmp_path, "dev"), wanted=False)
    assert "MLX_RUN_CGROUPS" in made.open()["reason"]
    assert made.enclose("ab12cd34", MIB) is None


def test_a_group_that_cannot_be_made_is_done_without(backstop: Backstop, kernel: Kernel, tmp_path: Path) -> None:
    kernel.refuses.add(kernel.top / "run-1.scope/mlx-run-ab12cd34/memory.oom.group")
    assert Bounds(backstop).enclose("ab12cd34", spec()) == ""
    assert not (kernel.top / "run-1.scope/mlx-run-ab12cd34").exists()
    assert not list((tmp_path / "state/dev/e").glob("*.group"))


def test_a_group_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    gone = Group(tmp_path / "gone")
    gone.allow(MIB)
    assert (gone.kills, gone.holds(1), gone.remove()) == (0, False, True)
