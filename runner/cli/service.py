"""`mlx-run service`: has systemd or launchd keep a runner up, from one login to the next."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Final

from runner.cli.locate import add_files, manifests
from runner.cli.supervisors import State, Supervisor, this_supervisor
from runner.cli.units import Service, passed_on
from runner.control import client
from runner.control.state_folder import StateFolder
from runner.errors import ManifestError, RunnerError, UsageError
from runner.options import state_dir

_UP_SECONDS, _LOOK = 20.0, 0.05
"""How long a runner may take to answer after it was started, and how often it is looked for."""

_VARIABLES = "A service does not see this shell's variables: put them into a file that the manifest names as env_file."

MIXED: Final = True
"""Words and options in any order."""

_ACTIONS = ("install", "uninstall", "status")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("action", choices=_ACTIONS, metavar="|".join(_ACTIONS), help="what to do")
    parser.add_argument(
        "target", nargs="?", metavar="FILE|NAME", help="install: a manifest; the others: a runner's name"
    )
    add_files(parser, about="a manifest, or an overlay over those before it")
    parser.add_argument("--print", dest="show", action="store_true", help="install: print the unit, and do nothing")
    parser.add_argument("--no-start", dest="start", action="store_false", help="install: write the unit only")
    parser.epilog = (
        "install writes a systemd user unit (Linux) or a launchd agent (macOS) that runs `mlx-run apply` at each\n"
        "login, and again when it fails, and starts it. It sees none of your variables but MLX_RUN_* and HF_*,\n"
        "and no keys: put those into the manifest's env_file. Edits of the manifest go live as ever.\n\n"
        "example:\n"
        "  mlx-run service install configs/dev.yaml\n"
        "  mlx-run service status\n"
        "  mlx-run service uninstall dev"
    )


def run(arguments: argparse.Namespace) -> int:
    """0; of status 3 when a service is down or there is none. Raises RunnerError and ManifestError."""
    supervisor = this_supervisor()
    if arguments.action == "install":
        return _install(arguments, supervisor)
    if arguments.files:
        raise UsageError(f"{arguments.action} takes a runner's name", hint=f"Installed: {_list(supervisor)}.")
    if arguments.action == "uninstall":
        return _uninstall(_the_name(arguments.target, supervisor), supervisor)
    return _status([arguments.target] if arguments.target else supervisor.names(), supervisor)


def _install(arguments: argparse.Namespace, supervisor: Supervisor) -> int:
    service = _service(arguments)
    text = supervisor.text(service)
    if arguments.show:
        print(text, end="")
        return 0
    if arguments.start:
        supervisor.check()
    path, name = supervisor.path(service.name), service.name
    before = supervisor.state(name)
    if not before.running and _is_up(name):
        raise RunnerError(f"a runner named {name!r} is up already", hint=f"Stop it first: mlx-run down {name}")
    changed = not path.exists() or path.read_text(encoding="utf-8") != text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunnerError(f"cannot write {path}: {error.strerror}") from None
    print(f"{path}: {'written' if changed else 'unchanged'}")
    if arguments.start:
        supervisor.start(name, changed=changed)
        _await(name, supervisor)
        print(f"{name}: started. `mlx-run status {name}` shows it, `mlx-run service uninstall {name}` removes it.")
        print(supervisor.hint(name))
    return 0


def _is_up(name: str) -> bool:
    return client.is_up(StateFolder(state_dir(), name, create=False).control_socket)


def _await(name: str, supervisor: Supervisor) -> None:
    """Until the runner answers. Raises RunnerError when it does not come up."""
    deadline = time.monotonic() + _UP_SECONDS
    while not _is_up(name):
        if time.monotonic() > deadline:
            state = supervisor.state(name)
            raise RunnerError(f"{name} does not come up: {_words(state)}", hint=supervisor.hint(name))
        time.sleep(_LOOK)


def _service(arguments: argparse.Namespace) -> Service:
    """Raises ManifestError where the manifest cannot be used with what the service will see."""
    if arguments.target:
        arguments.files = [arguments.target, *(arguments.files or [])]
    paths = manifests(arguments)
    environment = passed_on(os.environ)
    # Imported here: status and uninstall need no YAML.
    from runner.manifest.load import load_manifest  # noqa: PLC0415

    try:
        name = load_manifest(paths, environment).manifest.name
    except ManifestError:
        load_manifest(paths, os.environ)  # it can be used here, at least: so it is variables that are missing there
        print(_VARIABLES, file=sys.stderr)
        raise
    return Service(name, paths, environment)


def _uninstall(name: str, supervisor: Supervisor) -> int:
    path = supervisor.path(name)
    if not path.exists():
        raise RunnerError(f"no service named {name!r} is installed", hint=f"Installed: {_list(supervisor)}.")
    supervisor.stop(name)
    path.unlink()
    supervisor.forget()
    print(f"{name}: stopped, and {path} removed.")
    return 0


def _status(names: list[str], supervisor: Supervisor) -> int:
    if not names:
        print("No service is installed. `mlx-run service install FILE` installs one.")
        return 3
    states = {name: supervisor.state(name) for name in names}
    for name, state in states.items():
        print(f"{name}: {_words(state)}")
        if state.installed:
            print(f"  {supervisor.path(name)}")
    return 0 if all(state.running for state in states.values()) else 3


def _words(state: State) -> str:
    if not state.installed:
        return "not installed"
    pid = f", pid {state.pid}" if state.pid else ""
    return f"{state.detail}{pid}" + ("" if state.enabled else ", not started at login")


def _the_name(name: str | None, supervisor: Supervisor) -> str:
    """What is meant without a name: the only one."""
    names = supervisor.names()
    if name is None and len(names) != 1:
        raise UsageError("which service?", hint=f"Installed: {_list(supervisor)}.")
    return name or names[0]


def _list(supervisor: Supervisor) -> str:
    return ", ".join(supervisor.names()) or "none"
