"""The process that reads manifests, alone."""

import pickle
import socket
import subprocess
from pathlib import Path

from runner.processes import python_module


def test_says_nothing_when_nobody_waits_for_its_answer(tmp_path: Path) -> None:
    (tmp_path / "dev.yaml").write_text("name: dev\n")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = python_module("runner.control.compile", str(theirs.fileno()))
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
            theirs.close()
            ours.sendall(pickle.dumps(((tmp_path / "dev.yaml",), None, None, False)))
            ours.close()  # as a Ctrl-C does to it
            _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")
