"""How the machine's own supervisor is told to run a manifest: a systemd user unit, or a launchd agent. Pure text."""

from __future__ import annotations

import plistlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from runner.processes import python_module

STOP_SECONDS: Final = 45
"""Before the supervisor kills: the runner drains for 30 s by itself."""

_RESTART_SECONDS: Final = 1
"""Well below what engines wait for another runner after theirs was killed."""

_STARTS, _STARTS_WITHIN = 5, 60
"""A manifest that cannot be applied is tried so often, then it is left to the user."""

_PASSED: Final = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
)
_SETTINGS: Final = "MLX_RUN_"
_SECRET: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True, slots=True)
class Service:
    """A manifest as a service. Paths are absolute; `environment` is all that it sees of the user's."""

    name: str
    manifests: tuple[Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """What is run."""
        files = [part for path in self.manifests for part in ("-f", str(path))]
        return python_module("runner.cli.main", "apply", *files)


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment belongs to a service: where things are, and our settings; nothing that looks secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in _PASSED or (name.startswith(_SETTINGS) and not any(word in name for word in _SECRET))
    }


def systemd_unit(service: Service) -> str:
    """A unit for `systemctl --user`.

    Only the runner is told to stop; engines end with it. If it is killed, they stay for a few seconds, and the runner
    that systemd starts takes them over.
    """
    lines = [
        "# Written by `mlx-run service install`; `mlx-run service uninstall` removes it.",
        "[Unit]",
        f"Description=mlx-run {service.name}: {_specifiers(str(service.manifests[0]))}",
        f"StartLimitIntervalSec={_STARTS_WITHIN}",
        f"StartLimitBurst={_STARTS}",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(map(_argument, service.command))}",
        f"WorkingDirectory={_specifiers(str(service.manifests[0].parent))}",
        *(f'Environment="{_quoted(name)}={_quoted(value)}"' for name, value in service.environment.items()),
        "KillMode=process",
        # A control group for each engine, beside the runner's own; systemd before 254 does not know the second line.
        "Delegate=yes",
        "DelegateSubgroup=runner",
        f"TimeoutStopSec={STOP_SECONDS}",
        "Restart=on-failure",
        f"RestartSec={_RESTART_SECONDS}",
        "RestartPreventExitStatus=64",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def _argument(text: str) -> str:
    """One word of ExecStart: systemd expands % and $ there."""
    quoted = _quoted(text).replace("$", "$$")
    return quoted if quoted == text and not any(c in text for c in " \t;'") else f'"{quoted}"'


def _quoted(text: str) -> str:
    return _specifiers(text).replace("\\", "\\\\").replace('"', '\\"')


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def launchd_agent(service: Service, label: str, log: Path) -> bytes:
    """A property list for `launchctl`; what the runner prints goes to `log`. See `systemd_unit` for its conduct."""
    agent: dict[str, Any] = {
        "Label": label,
        "ProgramArguments": service.command,
        "WorkingDirectory": str(service.manifests[0].parent),
        "EnvironmentVariables": dict(service.environment),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 5,
        "ExitTimeOut": STOP_SECONDS,
        "AbandonProcessGroup": True,
        "ProcessType": "Interactive",  # else macOS gives it less of the processor than an application
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    return plistlib.dumps(agent)
