"""`mlx-run service`, with a stand-in for the supervisor that runs what it is told to."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.cli.main import main
from tests.control.scene import FAKE_ENGINE, free_port, write_safetensors
from tests.stories.harness import alive, until

SUPERVISOR = Path(__file__).with_name("supervisor.py")


class Home:
    """A home folder with a manifest, on a machine with systemd or with launchd."""

    def __init__(self, folder: Path, platform: str) -> None:
        self.folder = folder
        self.systemd = platform == "linux"
        self.manifest = folder / "dev.yaml"
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        write_safetensors(model / "model.safetensors", {"w": [4, 4]})
        self.manifest.write_text(
            f"name: dev\nservers:\n  lm:\n    port: {free_port()}\nmodels: {{chat: {{source: ./model}}}}\n"
        )

    @property
    def unit(self) -> Path:
        """Where the supervisor's file is to be."""
        if self.systemd:
            return self.folder / ".config" / "systemd" / "user" / "mlx-run-dev.service"
        return self.folder / "Library" / "LaunchAgents" / "mlx-run.dev.plist"

    def asked(self) -> list[str]:
        """What the supervisor was asked to change, since the last look."""
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [line for line in lines if " show" not in line and " print " not in line]


@pytest.fixture
def platform() -> str:
    """Which machine it is; a test may say otherwise."""
    return "linux"


@pytest.fixture
def home(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("systemctl", "launchctl"):
        (commands / name).write_text(f"#!{sys.executable}\n{SUPERVISOR.read_text()}")
        (commands / name).chmod(0o755)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MLX_RUN_ORPHAN_GRACE", "1")
    monkeypatch.setenv("MLX_RUN_ENGINE_COMMAND", shlex.join([sys.executable, str(FAKE_ENGINE)]))
    made = Home(tmp_path, platform)
    yield made
    if made.unit.exists():
        main(["service", "uninstall", "dev"])


both = pytest.mark.parametrize("platform", ["linux", "darwin"])


@pytest.mark.parametrize("platform", ["linux", pytest.param("darwin", marks=pytest.mark.nightly)])
def test_from_installation_to_removal(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "install", str(home.manifest)]) == 0
    assert home.unit.exists()
    asked = home.asked()
    if home.systemd:
        unit = "mlx-run-dev.service"
        assert asked == [f"systemctl --user {c}" for c in ("daemon-reload", f"enable {unit}", f"restart {unit}")]
    else:
        domain = f"gui/{os.getuid()}"
        assert asked == [f"launchctl enable {domain}/mlx-run.dev", f"launchctl bootstrap {domain} {home.unit}"]
    assert main(["wait", "dev", "--for", "ready"]) == 0
    capsys.readouterr()
    assert main(["service", "status"]) == 0
    shown = capsys.readouterr().out
    assert "dev: " in shown
    assert "running" in shown
    pid = int(shown.split("pid ")[1].split()[0].rstrip(","))
    assert alive(pid)

    assert main(["service", "install", str(home.manifest)]) == 0, "as it is: nothing is started anew"
    assert "unchanged" in capsys.readouterr().out
    assert not any("restart" in line or "bootstrap" in line for line in home.asked())

    assert main(["service", "uninstall"]) == 0
    assert not home.unit.exists()
    until(lambda: not alive(pid))
    assert main(["service", "status"]) == 3
    assert "No service is installed" in capsys.readouterr().out


@both
def test_printing_changes_nothing(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "install", str(home.manifest), "--print"]) == 0
    assert str(home.manifest) in capsys.readouterr().out
    assert not home.unit.exists()
    assert home.asked() == []


@both
def test_without_starting(home: Home) -> None:
    assert main(["service", "install", str(home.manifest), "--no-start"]) == 0
    assert home.unit.exists()
    assert home.asked() == []


def test_a_manifest_that_needs_the_shells_variables(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PORT", "8123")
    port = re.compile(r"port: \d+")
    home.manifest.write_text(port.sub("port: ${MY_PORT:?say which}", home.manifest.read_text()))
    assert main(["validate", str(home.manifest)]) == 0
    assert main(["service", "install", str(home.manifest)]) == 1
    shown = capsys.readouterr().err
    assert "MY_PORT" in shown
    assert "env_file" in shown
    assert not home.unit.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["install"], 64, "no manifest is given"),
        (["install", "nowhere.yaml"], 1, "there is no such file"),
        (["uninstall", "nobody"], 1, "no service named 'nobody' is installed"),
        (["uninstall"], 64, "Installed: none."),
        (["status", "-f", "dev.yaml"], 64, "takes a runner's name"),
    ],
)
def test_what_cannot_be(
    home: Home, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["service", *arguments]) == code
    assert said in capsys.readouterr().err


@both
def test_a_machine_without_a_supervisor(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["service", "install", str(home.manifest)]) == 1
    assert "--print" in capsys.readouterr().err
    assert not home.unit.exists()
