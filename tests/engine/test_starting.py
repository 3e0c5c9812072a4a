"""What a start does not pay for, and what it does side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runner.engine import language, loader
from runner.engine.beside import Beside
from runner.engine.loader import load
from runner.environment import prepared
from tests.engine.client import PATIENCE
from tests.engine.conftest import ModelFolder

ROOT = Path(__file__).parents[2]


def printed(code: str, *arguments: str) -> Any:
    """What a process that could be an engine prints, as JSON."""
    environ = prepared({**os.environ, "PYTHONPATH": str(ROOT)}, time.monotonic())
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return json.loads(done.stdout)


def test_what_the_loop_needs_defines_no_dataclass() -> None:
    """Each takes 0.4 ms of a start to define, and a record of msgspec a fortieth of that."""
    code = (
        "import json, sys\n"
        "import runner.engine.loop, runner.engine.language, runner.engine.process, runner.engine.watchdog\n"
        "ours = [module for name, module in sys.modules.items() if name.startswith('runner.')]\n"
        "classes = {value for module in ours for value in vars(module).values() if isinstance(value, type)}\n"
        "print(json.dumps(sorted(str(one) for one in classes if '__dataclass_fields__' in vars(one))))\n"
    )
    assert printed(code) == []


def test_weights_come_before_what_text_needs_is_imported() -> None:
    code = (
        "import json, sys\n"
        "import runner.engine.loader\n"
        "print(json.dumps([name for name in ('jinja2', 'tokenizers', 'runner.engine.loop') if name in sys.modules]))\n"
    )
    assert printed(code) == []


def test_text_is_read_while_the_model_is_tried(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()
    met: list[bool] = []
    readers: list[threading.Thread] = []
    install, read = loader.equip, language.narrow_language

    def installing(*arguments: Any) -> Any:
        tried.set()
        return install(*arguments)

    def reading(*arguments: Any) -> Any:
        met.append(tried.wait(PATIENCE))
        return read(*arguments)

    monkeypatch.setattr(loader, "equip", installing)
    monkeypatch.setattr(language, "narrow_language", reading)
    load(model_folder("llama"), meanwhile=lambda: readers.append(threading.current_thread()))

    assert met == [True]
    assert readers != []
    assert threading.main_thread() not in readers


def test_what_fails_beside_fails_where_it_is_waited_for() -> None:
    with pytest.raises(ZeroDivisionError):
        Beside(lambda: 1 // 0).result()
    assert Beside(lambda: 7).result() == 7


def test_no_garbage_is_looked_for_while_an_engine_is_imported() -> None:
    code = (
        "import gc, json, sys, types\n"
        "command = sys.modules['runner.engine.command'] = types.ModuleType('runner.engine.command')\n"
        "command.serve = lambda *_: print(json.dumps(gc.isenabled()))\n"
        "from runner.engine.__main__ import main\n"
        "main()\n"
    )
    assert printed(code) is False


def test_garbage_is_looked_for_once_a_model_is_loaded(model_folder: ModelFolder, tmp_path: Path) -> None:
    code = (
        "import gc, json, sys, time\n"
        "from pathlib import Path\n"
        "from runner.engine.process import EngineProcess\n"
        "from runner.engine.transport import Transport\n"
        "from runner.protocol import EngineSpec\n"
        "gc.disable()\n"
        "spec = EngineSpec(model='tiny', path=sys.argv[1], digest='d', orphan_grace=0.0)\n"
        "code = EngineProcess(spec, Transport(Path(sys.argv[2])), time.monotonic()).run()\n"
        "print(json.dumps([code, gc.isenabled(), gc.get_freeze_count() > 0]))\n"
    )
    assert printed(code, str(model_folder("llama")), str(tmp_path / "e.sock")) == [0, True, True]
