"""What people point at a port: other packages for Python, and the official ones for JavaScript. Run by hand:

    pip install -e '.[clients]'
    pytest -m nightly tests/stories/test_other_clients.py

The JavaScript half needs node and npm, and installs three packages into a folder of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.control.scene import FAKE_ENGINE, Scene
from tests.stories.caller import build_caller
from tests.stories.demo import LONG
from tests.stories.harness import Bench, until
from tests.stories.test_clients import EXTRACT, PARAMETERS, PERSON, SUNNY, TOOL, WEATHER

pytestmark = [pytest.mark.story, pytest.mark.mlx, pytest.mark.nightly, pytest.mark.filterwarnings("default")]

NORA = {"name": "Nora", "age": 34}
SUM, ANSWER = "What is 17 + 25?", "17 + 25 = 42."
PIRATE = "Arr! 17 + 25 be 42, matey."
WEATHER_THERE = "sunny, 21 degrees"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server with every API, and two models, so that a request has to name one."""
    bench = Bench(tmp_path_factory.mktemp("others"))
    bench.write(extra=f"  other:\n    source: {Path(__file__).parents[2] / 'examples/models/demo-draft'}\n")
    text = bench.manifest.read_text()
    text = text.replace(f"{{port: {bench.port}}}", f"{{port: {bench.port}, apis: [openai, anthropic, ollama]}}")
    bench.save(text.replace("  demo-chat:\n", "  chat:\n"))
    with bench.serving():
        yield bench
    bench.close()


@pytest.fixture(autouse=True)
def _what_packages_leave_open_is_theirs() -> Iterator[None]:
    """Collected here, where warnings are none of ours, and not when pytest ends."""
    yield
    gc.collect()


def test_litellm(served: Bench) -> None:
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {"api_base": f"{served.url}/v1", "api_key": "none", "temperature": 0}
    ask = {"model": "openai/chat", "messages": [{"role": "user", "content": SUM}]}
    assert litellm.completion(**ask, **options).choices[0].message.content == ANSWER
    chunks = litellm.completion(**ask, **options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    called = litellm.completion(
        model="openai/chat", messages=[{"role": "user", "content": WEATHER}], tools=[TOOL], **options
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": call.id, "content": WEATHER_THERE}
    talk = [{"role": "user", "content": WEATHER}, called.choices[0].message.model_dump(exclude_none=True), result]
    told = litellm.completion(model="openai/chat", messages=talk, tools=[TOOL], **options)
    assert told.choices[0].message.content == SUNNY
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    filled = litellm.completion(
        model="openai/chat", messages=[{"role": "user", "content": EXTRACT}], response_format=form, **options
    )
    assert json.loads(filled.choices[0].message.content) == NORA
    pirate = litellm.completion(**ask, **options, extra_body={"adapter_name": "pirate"})
    assert pirate.choices[0].message.content == PIRATE
    left = litellm.completion(model="openai/chat", messages=[{"role": "user", "content": LONG}], stream=True, **options)
    next(iter(left))
    left.completion_stream.close()
    until(lambda: served.metric("mlx_run_engine_rows") == 0)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/llama", messages=ask["messages"], **options)
    through_anthropic = litellm.completion(
        model="anthropic/chat", messages=ask["messages"], api_base=served.url, api_key="none", max_tokens=50
    )
    assert through_anthropic.choices[0].message.content
    through_ollama = litellm.completion(model="ollama_chat/chat", messages=ask["messages"], api_base=served.url)
    assert through_ollama.choices[0].message.content


def test_langchain(served: Bench) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="chat", base_url=f"{served.url}/v1", api_key="none", temperature=0)
    assert chat.invoke(SUM).content == ANSWER
    assert "".join(chunk.content for chunk in chat.stream(SUM)) == ANSWER
    able = chat.bind_tools([TOOL])
    called = able.invoke(WEATHER)
    assert called.tool_calls[0]["args"] == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": WEATHER_THERE}
    assert able.invoke([("user", WEATHER), called, result]).content == SUNNY
    form = chat.with_structured_output({"title": "person", **PERSON}, method="json_schema")
    assert form.invoke(EXTRACT) == NORA
    pirate = langchain.ChatOpenAI(
        model="chat", base_url=f"{served.url}/v1", api_key="none", temperature=0, extra_body={"adapter_name": "pirate"}
    )
    assert pirate.invoke(SUM).content == PIRATE
    left = chat.stream(LONG)
    next(left)
    left.close()
    until(lambda: served.metric("mlx_run_engine_rows") == 0)
    nowhere = langchain.ChatOpenAI(model="llama", base_url=f"{served.url}/v1", api_key="none")
    with pytest.raises(openai.NotFoundError):
        nowhere.invoke(SUM)


def test_pydantic_ai(served: Bench) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, ModelHTTPError, NativeOutput, StructuredDict
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{served.url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("chat", provider=provider), model_settings={"temperature": 0})

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather."""
        return "sunny, 21 degrees" if city == "Oslo" else "unknown"

    assert agent.run_sync(WEATHER).output == SUNNY
    plain = Agent(OpenAIChatModel("chat", provider=provider), model_settings={"temperature": 0})
    assert plain.run_sync(SUM).output == ANSWER
    assert asyncio.run(_streamed(plain, SUM)) == ANSWER
    form = Agent(plain.model, output_type=NativeOutput(StructuredDict(PERSON, name="person")))
    assert form.run_sync(EXTRACT, model_settings={"temperature": 0}).output == NORA
    settings: Any = {"temperature": 0, "extra_body": {"adapter_name": "pirate"}}
    assert plain.run_sync(SUM, model_settings=settings).output == PIRATE
    assert asyncio.run(_streamed(plain, LONG, pieces=1))
    until(lambda: served.metric("mlx_run_engine_rows") == 0)
    with pytest.raises(ModelHTTPError, match="llama") as caught:
        Agent(OpenAIChatModel("llama", provider=provider)).run_sync(SUM)
    assert caught.value.status_code == 404


async def _streamed(agent: Any, question: str, pieces: int = 1000) -> str:
    """The first so many pieces of an answer; whoever has them leaves."""
    found: list[str] = []
    async with agent.run_stream(question) as run:
        async for piece in run.stream_text(delta=True, debounce_by=None):
            found.append(piece)
            if len(found) == pieces:
                break
    return "".join(found)


@pytest.fixture
def of_llm(served: Bench, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a question to a model, with options."""
    pytest.importorskip("llm")
    names = {"local": "chat", "pirate": "chat:pirate", "nowhere": "llama"}
    entry = "- model_id: {}\n  model_name: {}\n  api_base: {}/v1\n  supports_tools: true\n  supports_schema: true\n"
    entries = [entry.format(own, name, served.url) for own, name in names.items()]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(entries))

    def command(model: str, *more: str) -> list[str]:
        fixed = ["-m", model, "--key", "none", "-o", "temperature", "0", "--no-log"]
        return ["env", f"LLM_USER_PATH={tmp_path}", sys.executable, "-m", "llm", *fixed, *more]

    return command


def test_llm(served: Bench, of_llm: Callable[..., list[str]]) -> None:
    """Streams, unless it is told not to."""

    def said(*arguments: str) -> str:
        done = subprocess.run(of_llm(*arguments), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said("local", SUM) == ANSWER
    assert said("local", "--no-stream", SUM) == ANSWER
    assert said("pirate", SUM) == PIRATE
    function = f"def get_weather(city: str) -> str:\n    'The weather.'\n    return {WEATHER_THERE!r}"
    assert said("local", "--functions", function, WEATHER).endswith(SUNNY)
    assert json.loads(said("local", "--schema", json.dumps(PERSON), EXTRACT)) == NORA
    refused = subprocess.run(of_llm("nowhere", SUM), capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "llama" in refused.stderr
    with subprocess.Popen(of_llm("local", LONG), stdout=subprocess.PIPE, start_new_session=True) as left:
        assert left.stdout is not None
        assert left.stdout.read(1)
        left.kill()
    until(lambda: served.metric("mlx_run_engine_rows") == 0)


@pytest.mark.parametrize("kind", ["openai-chat", "anthropic", "open-responses"])
def test_llm_comply(served: Bench, kind: str) -> None:
    """All but images: this version has no models that see."""
    pytest.importorskip("llm_comply")
    command = [Path(sys.executable).with_name("llm-comply"), "-u", f"{served.url}/v1", "-k", "none", "-m", "chat"]
    done = subprocess.run(
        [*command, "--format", kind, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    results = json.loads(done.stdout)["results"]
    failed = [result["id"] for result in results if result["status"] == "failed"]
    assert [name for name in failed if not name.endswith("image-input")] == [], done.stdout
    assert sum(result["status"] == "passed" for result in results) >= 7


SCRIPT = Path(__file__).with_name("clients.mjs")


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_javascript(served: Bench, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "clients", "type": "module"}')
    shutil.copy(SCRIPT, tmp_path)
    npm = [str(shutil.which("npm")), "install", "--no-audit", "--no-fund", "openai", "ollama", "@anthropic-ai/sdk"]
    subprocess.run(npm, cwd=tmp_path, check=True, capture_output=True, timeout=110)
    node = [str(shutil.which("node")), "clients.mjs", served.url, SUM, WEATHER, json.dumps(PARAMETERS)]
    node += [EXTRACT, json.dumps(PERSON), LONG]
    done = subprocess.run(node, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("anthropicTool").keys() == {"city"}
    assert {"chat", "chat:pirate", "other"} <= set(found.pop("ollamaModels"))
    assert found == {
        "openai": ANSWER,
        "openaiStream": ANSWER,
        "openaiTool": {"city": "Oslo"},
        "openaiError": "NotFoundError",
        "openaiBadRequest": "BadRequestError",
        "openaiForm": NORA,
        "openaiAdapter": "Arr! 17 + 25 be 42, matey.",
        "responses": ANSWER,
        "anthropicError": "NotFoundError",
        "anthropicAdapter": "17 + 25 = 42!!!",
        "ollamaStream": ANSWER,
        "ollamaTool": {"city": "Oslo"},
        "ollamaForm": NORA,
        "ollamaError": "ResponseError",
    }
    until(lambda: served.metric("mlx_run_engine_rows") == 0)  # three streams were left


@pytest.fixture(scope="module")
def claude(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Claude Code's own command, of the npm package, in a folder and a home of its own: `claude(bench, *arguments)`."""
    if shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    home = tmp_path_factory.mktemp("claude")
    (home / "package.json").write_text('{"name": "clients"}')
    npm = [str(shutil.which("npm")), "install", "--no-audit", "--no-fund", "@anthropic-ai/claude-code"]
    subprocess.run(npm, cwd=home, check=True, capture_output=True, timeout=110)

    def run(bench: Bench, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": bench.url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": "chat",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        return subprocess.run(
            [home / "node_modules/.bin/claude", *arguments],
            cwd=bench.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


def test_claude_code(claude: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Over a stand-in for a model."""
    bench = Bench(tmp_path)
    scene = Scene(bench.folder)
    scene.model("large", geometry={"max_position_embeddings": 200_000}, tokens=4)
    bench.environment["MLX_RUN_ENGINE_COMMAND"] = shlex.join([sys.executable, str(FAKE_ENGINE)])
    server = f"{{port: {bench.port}, apis: [anthropic]}}"
    bench.save(f"name: dev\nservers: {{lm: {server}}}\nmodels: {{chat: {{source: ./models/large}}}}\n")
    with bench.serving():
        done = claude(bench, "-p", "Say hi")
    bench.close()
    assert (done.returncode, done.stdout.strip()) == (0, "base base base base"), done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_claude_code_has_a_tool_do_something(
    claude: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Over an engine and a model that calls a tool and says a word once that has answered: its whole first prompt, the
    call as a stream, the tool's result, and the answer."""
    bench = Bench(tmp_path)
    made = bench.folder / "made.txt"
    call = {"name": "Write", "arguments": {"file_path": str(made), "content": "forty-two"}}
    build_caller(bench.folder / "model", call, "All done.")
    server = f"{{port: {bench.port}, apis: [anthropic, openai]}}"
    model = "{source: ./model, kv_cache: {prefix_cache: 1GiB}}"
    bench.save(f"name: dev\nservers: {{lm: {server}}}\nmodels: {{chat: {model}}}\n")
    with bench.serving():
        done = claude(
            bench, "-p", "Write forty-two into made.txt", "--allowedTools", "Write", "--output-format", "json"
        )
        read = bench.metric("mlx_run_prompt_tokens_total")
        cached = bench.metric("mlx_run_cached_prompt_tokens_total")
        failed = bench.metric("mlx_run_engine_failed_total")
    bench.close()
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["result"], told["is_error"]) == ("All done.", False), told
    assert made.read_text() == "forty-two"
    assert read > 20_000, "its instructions and tools"
    assert cached > read / 3, "the second prompt begins with the first"
    assert failed == 0
