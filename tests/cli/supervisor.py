"""Stands in for systemctl and launchctl: runs the command of a unit, remembers its pid, and writes down what it was
asked. Enough for `mlx-run service`.
"""

from __future__ import annotations

import json
import os
import plistlib
import shlex
import signal
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["HOME"])
PIDS = HOME / "pids.json"
UNITS = HOME / ".config" / "systemd" / "user"


def pids() -> dict[str, int]:
    return json.loads(PIDS.read_text()) if PIDS.exists() else {}


def start(name: str, command: list[str], environment: dict[str, str]) -> None:
    stop(name)
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    PIDS.write_text(json.dumps({**pids(), name: process.pid}))


def stop(name: str) -> None:
    running = pids()
    if pid := running.pop(name, 0):
        os.kill(pid, signal.SIGTERM)
    PIDS.write_text(json.dumps(running))


def systemctl(arguments: list[str]) -> int:
    assert arguments.pop(0) == "--user"
    match arguments:
        case ["start" | "restart", unit]:
            lines = (UNITS / unit).read_text().splitlines()
            (command,) = (shlex.split(line.partition("=")[2]) for line in lines if line.startswith("ExecStart="))
            given = (shlex.split(line.partition("=")[2])[0] for line in lines if line.startswith("Environment="))
            start(unit, command, dict(pair.split("=", 1) for pair in given))
        case ["disable", "--now", unit]:
            stop(unit)
        case ["show", unit, *_]:
            pid = pids().get(unit, 0)
            active = "ActiveState=active\nSubState=running" if pid else "ActiveState=failed\nSubState=failed"
            print(f"{active}\nUnitFileState=enabled\nMainPID={pid}\nResult={'success' if pid else 'exit-code'}")
    return 0


def launchctl(arguments: list[str]) -> int:
    match arguments:
        case ["bootstrap", _, path]:
            agent = plistlib.loads(Path(path).read_bytes())
            start(agent["Label"], agent["ProgramArguments"], agent["EnvironmentVariables"])
        case ["bootout", target]:
            stop(target.rpartition("/")[2])
        case ["print", target] if target.count("/") == 2:
            pid = pids().get(target.rpartition("/")[2])
            if pid is None:
                print("Could not find service", file=sys.stderr)
                return 113
            print(f"{target} = {{\n\tactive count = 1\n\tstate = running\n\n\tpid = {pid}\n}}")
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    with (HOME / "asked").open("a") as asked:
        asked.write(shlex.join([name, *sys.argv[1:]]) + "\n")
    sys.exit({"systemctl": systemctl, "launchctl": launchctl}[name](sys.argv[1:]))
