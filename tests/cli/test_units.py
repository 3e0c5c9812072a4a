"""What systemd and launchd are told."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.units import Service, launchd_agent, passed_on, systemd_unit

PLAIN = Service("dev", (Path("/srv/models/dev.yaml"),), {"MLX_RUN_LOG_LEVEL": "debug"})
ODD = Service(
    "dev", (Path('/srv/my 50% $HOME "x" \\ y/a.yaml'), Path("/srv/b.yaml")), {"HF_HOME": '/big disk/50%/"x"\\$y'}
)


def test_a_systemd_unit() -> None:
    assert (
        systemd_unit(PLAIN)
        == f"""\
# Written by `mlx-run service install`; `mlx-run service uninstall` removes it.
[Unit]
Description=mlx-run dev: /srv/models/dev.yaml
StartLimitIntervalSec=60
StartLimitBurst=5

[Service]
Type=exec
ExecStart={sys.executable} -P -m runner.cli.main apply -f /srv/models/dev.yaml
WorkingDirectory=/srv/models
Environment="MLX_RUN_LOG_LEVEL=debug"
KillMode=process
Delegate=yes
DelegateSubgroup=runner
TimeoutStopSec=45
Restart=on-failure
RestartSec=1
RestartPreventExitStatus=64

[Install]
WantedBy=default.target
"""
    )


def test_what_systemd_would_expand_is_escaped() -> None:
    lines = systemd_unit(ODD).splitlines()
    (command,) = (line for line in lines if line.startswith("ExecStart="))
    assert command.endswith(' -f "/srv/my 50%% $$HOME \\"x\\" \\\\ y/a.yaml" -f /srv/b.yaml')
    assert 'WorkingDirectory=/srv/my 50%% $HOME "x" \\ y' in lines
    assert 'Environment="HF_HOME=/big disk/50%%/\\"x\\"\\\\$y"' in lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("service", [PLAIN, ODD])
def test_systemd_finds_nothing_wrong_with_it(service: Service, tmp_path: Path) -> None:
    unit = tmp_path / "mlx-run-dev.service"
    unit.write_text(systemd_unit(service))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "DelegateSubgroup" not in line]  # not known before 254
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("service", [PLAIN, ODD])
def test_a_launchd_agent(service: Service) -> None:
    agent = plistlib.loads(launchd_agent(service, "mlx-run.dev", Path("/logs/dev.log")))
    assert agent["Label"] == "mlx-run.dev"
    assert agent["ProgramArguments"] == service.command
    assert agent["WorkingDirectory"] == str(service.manifests[0].parent)
    assert agent["EnvironmentVariables"] == service.environment
    assert (agent["RunAtLoad"], agent["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert agent["StandardErrorPath"] == "/logs/dev.log"
    assert agent["AbandonProcessGroup"] is True, "engines outlive a runner that crashed"


def test_a_service_sees_settings_and_no_secrets() -> None:
    seen = passed_on(
        {
            "MLX_RUN_STATE_DIR": "/state",
            "MLX_RUN_API_KEY": "secret",
            "HF_HOME": "/hf",
            "HF_TOKEN": "secret",
            "PATH": "/bin",
            "OPENAI_API_KEY": "secret",
        }
    )
    assert seen == {"MLX_RUN_STATE_DIR": "/state", "HF_HOME": "/hf"}
