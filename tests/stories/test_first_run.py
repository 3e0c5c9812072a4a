"""Story: a newcomer pastes README's commands, chats, and looks around."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.stories.demo import HELD_OUT
from tests.stories.harness import DEADLINE, REPOSITORY, Bench, until

pytestmark = [pytest.mark.story, pytest.mark.mlx]

URL = "http://127.0.0.1:8080"
STYLES = {"none": "base", "pirate": "pirate", "shout": "shout"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    state = tmp_path_factory.mktemp("state")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "MLX_RUN_STATE_DIR": str(state), "PATH": path}


@pytest.fixture(scope="module")
def readme_runner(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """What README's first line starts after the install, as it stands there."""
    (command,) = re.findall(r"^pip install -e '\.\[cpu\]' && (mlx-run apply .*)$", _readme(), re.MULTILINE)
    process = subprocess.Popen(
        shlex.split(command),
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(lambda: process.poll() is not None or _is_ready())
        assert process.poll() is None, process.communicate()[0]
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    assert "servers.main: http://127.0.0.1:8080" in output
    assert "Ready after" in output
    assert "Traceback" not in output


def _readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _is_ready() -> bool:
    try:
        return httpx.get(f"{URL}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.usefixtures("readme_runner")
def test_curl_from_the_readme(environment: dict[str, str]) -> None:
    command = _block("curl ")
    answer = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "17 + 25 = 42."


@pytest.mark.usefixtures("readme_runner")
def test_python_from_the_readme(environment: dict[str, str], tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _readme(), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code)
    answer = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.stdout.startswith("Arr!"), answer.stderr


@pytest.mark.usefixtures("readme_runner")
def test_chat_from_the_readme(environment: dict[str, str]) -> None:
    command = _block("mlx-run chat")
    answer = subprocess.run(
        shlex.split(command), input="My name is Ada.\nWhat is my name?\n/adapter none\nWhat is 17 + 25?\n/quit\n",
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert "Yer name be Ada, matey." in answer.stdout
    assert "17 + 25 = 42." in answer.stdout


@pytest.mark.parametrize("adapter", STYLES)
@pytest.mark.usefixtures("readme_runner")
def test_the_official_client_hears_each_style(adapter: str) -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0) as client:
        rows = [r for r in HELD_OUT if r["kind"] not in ("tool", "count")][::8]
        right = 0
        for row in rows:
            answer = client.chat.completions.create(
                model="demo-chat", messages=row["messages"], temperature=0, extra_body={"adapter_name": adapter}
            )
            right += answer.choices[0].message.content == row[STYLES[adapter]]
        assert right >= 0.9 * len(rows)
        assert len(rows) >= 20


@pytest.mark.usefixtures("readme_runner")
def test_the_model_list_names_the_adapters() -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="unused") as client:
        assert {m.id for m in client.models.list()} >= {"demo-chat", "demo-chat:pirate", "demo-chat:shout"}
        with pytest.raises(NotFoundError, match="demo-chat"):
            client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])


def _block(start: str) -> str:
    """The first command of README that starts so, with its continuation lines."""
    found, *_ = re.findall(rf"^({re.escape(start)}(?:.*\\\n)*.*)$", _readme(), re.MULTILINE)
    return str(found)


def test_an_edit_of_dev_yaml_as_the_readme_says(bench: Bench) -> None:
    """`#` before the pirate line: the adapter is gone for the next request, the model was not loaded again."""
    configs = bench.folder / "configs"
    configs.mkdir()
    (bench.folder / "examples").symlink_to(REPOSITORY / "examples")
    text = (REPOSITORY / "configs" / "dev.yaml").read_text(encoding="utf-8")
    bench.manifest = configs / "dev.yaml"
    bench.manifest.write_text(re.sub(r"\b8080\b", str(bench.port), text))
    with bench.serving():
        before = bench.model()
        assert bench.ask("What is 17 + 25?", "pirate").startswith("Arr!")
        edited, count = re.subn(r"^(\s*)(pirate:)", r"\1# \2", bench.manifest.read_text(), flags=re.MULTILINE)
        assert count == 1
        bench.save(edited)
        until(lambda: [a["name"] for a in bench.model()["adapters"]] == ["shout"])
        with pytest.raises(NotFoundError, match="pirate"):
            bench.ask("What is 17 + 25?", "pirate")
        after = bench.model()
        assert (after["pid"], after["loaded_at"]) == (before["pid"], before["loaded_at"])


def test_detached_status_logs_plan_hand_over_and_down(bench: Bench) -> None:
    bench.write({"pirate": "./adapters/pirate"})
    started = bench.run("apply", "-d", str(bench.manifest))
    assert started.returncode == 0, started.stderr
    try:
        assert "Ready after" in started.stdout
        status = bench.run("status")
        assert status.returncode == 0
        assert "adapters: pirate" in status.stdout
        assert "nothing to do" in bench.run("plan", str(bench.manifest)).stdout
        bench.write()
        until(lambda: "nothing to do" in bench.run("plan", str(bench.manifest)).stdout)  # the watch was first
        copy = bench.folder / "copy.yaml"
        shutil.copy(bench.manifest, copy)
        bench.write({"shout": "./adapters/shout"})
        copy.write_text(bench.manifest.read_text())
        handed = bench.run("apply", str(copy))
        assert handed.returncode == 0, handed.stderr
        assert "engine ready" in bench.run("logs", "demo-chat").stdout
        assert "applied" in bench.run("logs").stdout
    finally:
        down = bench.run("down")
    assert down.returncode == 0
    gone = bench.run("status")
    assert gone.returncode == 1
    assert "mlx-run apply" in gone.stderr


def test_files_of_the_user_are_not_taken_for_libraries(bench: Bench) -> None:
    bench.write()
    for name in ("yaml", "tokenizers", "jinja2", "h2", "trace"):
        (bench.folder / f"{name}.py").write_text("raise SystemExit('not the library')\n")
    command = str(Path(sys.executable).parent / "mlx-run")
    options = {"env": bench.environment, "cwd": bench.folder, "capture_output": True, "text": True, "timeout": DEADLINE}
    started = subprocess.run([command, "apply", "-d", "dev.yaml"], **options)
    try:
        assert started.returncode == 0, started.stderr
        assert bench.ask("What is 17 + 25?") == "17 + 25 = 42."
    finally:
        subprocess.run([command, "down"], **options)
