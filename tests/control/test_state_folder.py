import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runner.control import client, state_folder
from runner.control.state_folder import StateFolder
from runner.errors import AlreadyRunning, RunnerError


def test_folders_belong_to_the_owner_alone(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "dev")
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700


def test_a_long_path_gets_a_short_socket_that_both_sides_compute(tmp_path: Path) -> None:
    root = tmp_path / ("x" * 120)
    root.mkdir()
    one, other = StateFolder(root, "dev"), StateFolder(root, "dev", create=False)
    assert len(str(one.control_socket)) <= 100
    assert one.control_socket == other.control_socket
    assert one.control_socket != one.engine_socket("ab12")


def test_the_short_place_is_the_same_for_a_service_and_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StateFolder(tmp_path / ("x" * 120), "dev")
    before = folder.control_socket
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert folder.control_socket == before


@pytest.mark.parametrize("left", ["a link", "open to all"])
def test_a_short_place_that_others_may_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    folder = StateFolder(tmp_path / ("x" * 120), "dev")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(state_folder, "_SHORT", tmp_path / "tmp")
    place = folder.control_socket.parent
    if left == "a link":
        place.rmdir()
        place.symlink_to(tmp_path)
    else:
        place.chmod(0o777)
    with pytest.raises(RunnerError, match="not a folder of yours alone"):
        _ = folder.control_socket


def test_one_runner_a_name(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "dev")
    lock = folder.lock()
    with pytest.raises(AlreadyRunning, match="'dev'"):
        folder.lock()
    lock.release()
    folder.lock().release()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runner.control.state_folder import StateFolder\n"
        "lock = StateFolder(Path(sys.argv[1]), 'dev').lock(); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(AlreadyRunning):
        StateFolder(tmp_path, "dev").lock()
    holder.kill()
    holder.communicate()
    StateFolder(tmp_path, "dev").lock().release()


def test_one_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunnerError, match=r"state folder .*file/dev cannot be made: Not a directory") as caught:
        StateFolder(tmp_path / "file", "dev")
    assert "MLX_RUN_STATE_DIR" in caught.value.hint
    assert not client.is_up(StateFolder(tmp_path / "file", "dev", create=False).control_socket)


def test_no_model_writes_into_the_runners_log(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "dev")
    logs = {str(folder.engine_log(model)).lower() for model in ("runner", "RUNNER", "runner.log", "chat")}
    assert str(folder.log).lower() not in logs
    assert len(logs) == 3
