"""systemd and launchd: where their files are, and what to tell them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runner.cli.units import Service, launchd_agent, systemd_unit
from runner.errors import RunnerError


@dataclass(frozen=True, slots=True)
class State:
    """What the supervisor says. `running` is now, `enabled` at the next login; `pid` is 0 where nothing runs."""

    installed: bool
    running: bool = False
    enabled: bool = False
    pid: int = 0
    detail: str = ""


class Supervisor(Protocol):
    """One of the two. Methods raise RunnerError when the supervisor refuses."""

    def hint(self, name: str) -> str:
        """What to know after an installation."""
        ...

    def path(self, name: str) -> Path:
        """The file of a service."""
        ...

    def text(self, service: Service) -> str:
        """Its content."""
        ...

    def check(self) -> None:
        """Whether it can be asked for anything."""
        ...

    def start(self, name: str, *, changed: bool) -> None:
        """Run it now and at each login; anew when its file has changed."""
        ...

    def stop(self, name: str) -> None:
        """Run it neither now nor at a login."""
        ...

    def forget(self) -> None:
        """Its file has been removed."""
        ...

    def state(self, name: str) -> State:
        """What it does."""
        ...

    def names(self) -> list[str]:
        """All services that are installed."""
        ...


def this_supervisor() -> Supervisor:
    """That of this machine. Raises RunnerError where there is none."""
    return Launchd() if sys.platform == "darwin" else Systemd()


class Systemd:
    """`systemctl --user`."""

    def hint(self, name: str) -> str:
        return (
            "It runs while you are logged in; `loginctl enable-linger` has it run from the machine's start.\n"
            f"What it prints: journalctl --user -u {self._unit(name)}"
        )

    def path(self, name: str) -> Path:
        return self._folder / self._unit(name)

    def text(self, service: Service) -> str:
        return systemd_unit(service)

    def check(self) -> None:
        self._run("show-environment")

    def start(self, name: str, *, changed: bool) -> None:
        self._run("daemon-reload")
        self._run("enable", self._unit(name))
        self._run("restart" if changed else "start", self._unit(name))

    def stop(self, name: str) -> None:
        self._run("disable", "--now", self._unit(name))

    def forget(self) -> None:
        self._run("daemon-reload")

    def state(self, name: str) -> State:
        if not self.path(name).exists():
            return State(installed=False)
        wanted = "ActiveState,SubState,UnitFileState,MainPID,Result"
        shown = dict(
            line.partition("=")[::2] for line in self._run("show", self._unit(name), "-p", wanted).splitlines()
        )
        active, why = shown.get("ActiveState", "unknown"), shown.get("Result", "success")
        detail = f"{active} ({shown.get('SubState', '')})" + (f", {why}" if why != "success" else "")
        pid = int(shown.get("MainPID") or 0)
        return State(True, active in ("active", "activating"), shown.get("UnitFileState") == "enabled", pid, detail)

    def names(self) -> list[str]:
        return _names(self._folder, "mlx-run-*.service", r"mlx-run-(.+)\.service")

    @property
    def _folder(self) -> Path:
        base = os.environ.get("XDG_CONFIG_HOME")
        return (Path(base) if base else Path.home() / ".config") / "systemd" / "user"

    @staticmethod
    def _unit(name: str) -> str:
        return f"mlx-run-{name}.service"

    @staticmethod
    def _run(*arguments: str) -> str:
        return _run(["systemctl", "--user", *arguments], "systemd does not run for this user")


class Launchd:
    """`launchctl`, in the domain of the user's session."""

    def hint(self, name: str) -> str:
        return f"It runs while you are logged in. What it prints: {self.log(name)}"

    def path(self, name: str) -> Path:
        return self._folder / f"{self.label(name)}.plist"

    def log(self, name: str) -> Path:
        """Where the runner's output goes."""
        return Path.home() / "Library" / "Logs" / "mlx-run" / f"{name}.log"

    def text(self, service: Service) -> str:
        return launchd_agent(service, self.label(service.name), self.log(service.name)).decode()

    def check(self) -> None:
        _run(["launchctl", "print", self._domain], "launchd has no session for this user")

    def start(self, name: str, *, changed: bool) -> None:
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        running = self.state(name).detail != "not loaded"
        if running and not changed:
            return
        if running:
            self.stop(name)
        _run(["launchctl", "enable", self._target(name)], "launchd refuses")
        _run(["launchctl", "bootstrap", self._domain, str(self.path(name))], "launchd refuses")

    def stop(self, name: str) -> None:
        if self.state(name).detail != "not loaded":
            _run(["launchctl", "bootout", self._target(name)], "launchd refuses")

    def forget(self) -> None:
        """launchd looks at the folder at the next login."""

    def state(self, name: str) -> State:
        if not self.path(name).exists():
            return State(installed=False)
        asked = _start(["launchctl", "print", self._target(name)])
        if asked.returncode != 0:
            return State(True, detail="not loaded")
        shown = dict(re.findall(r"^\t(state|pid|last exit code) = (.*)$", asked.stdout, re.MULTILINE))
        state, pid = shown.get("state", "unknown"), int(shown.get("pid", 0))
        ended = shown.get("last exit code", "")
        detail = state + (f", last exit code {ended}" if ended.isdigit() and ended != "0" else "")
        return State(True, state == "running", True, pid, detail)

    def names(self) -> list[str]:
        return _names(self._folder, "mlx-run.*.plist", r"mlx-run\.(.+)\.plist")

    @staticmethod
    def label(name: str) -> str:
        """launchd's name for it."""
        return f"mlx-run.{name}"

    @property
    def _folder(self) -> Path:
        return Path.home() / "Library" / "LaunchAgents"

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    def _target(self, name: str) -> str:
        return f"{self._domain}/{self.label(name)}"


def _names(folder: Path, glob: str, pattern: str) -> list[str]:
    found = [re.fullmatch(pattern, path.name) for path in sorted(folder.glob(glob))]
    return [match[1] for match in found if match is not None]


def _run(command: list[str], otherwise: str) -> str:
    done = _start(command)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RunnerError(f"`{' '.join(command)}` failed: {said or otherwise}", hint=otherwise if said else "")
    return done.stdout


def _start(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunnerError(
            f"cannot run {command[0]}: {error.strerror}",
            hint="`mlx-run service install --print` shows what to give to another supervisor.",
        ) from None
