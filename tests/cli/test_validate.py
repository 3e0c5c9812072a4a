"""`mlx-run validate` as CI and people call it: what goes to which stream, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from runner.cli import validate
from runner.cli.main import main
from runner.manifest.tree import Problem
from tests.inspect.folders import queries, write_llama, write_lora

SOUND = "name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: ./chat}}\n"
OPEN = "name: dev\nservers: {main: {port: 8080}}\nmodels: {chat: {source: org/chat}}\n"
WRONG = "name: dev\nservers: {main: {port: 80800}}\nmodels: {chat: {sorce: ./chat}}\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(validate, "check_ports", lambda *_: ())  # other tests may have a port of that number
    write_llama(tmp_path / "chat")
    for name, text in {"sound": SOUND, "open": OPEN, "wrong": WRONG}.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")


def _validate(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["validate", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_text(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "sound.yaml", "wrong.yaml")
    assert (code, out) == (1, "sound.yaml: ok (1 model, 1 server)\n")
    assert [line for line in err.splitlines() if line.startswith("wrong.yaml:")] == [
        "wrong.yaml:2:24: servers.main.port: should be at most 65535, not 80800 [E204]",
        'wrong.yaml:3:17: models.chat.sorce: unknown key "sorce" [E201]',
    ]


def test_a_warning_is_shown_and_passes(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "open.yaml")
    skipped = "org/chat is not in the hub's cache, and was not checked"
    assert (code, out) == (0, f"open.yaml: ok (1 model, 1 server; {skipped})\n")
    assert err.startswith("open.yaml:3:25: warning: models.chat.source: org/chat (main) ")


def test_strict_makes_an_error_of_a_warning(capsys: Capture) -> None:
    code, out, err = _validate(capsys, "--strict", "open.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("open.yaml:3:25: models.chat.source: org/chat (main) ")
    assert _validate(capsys, "--strict", "sound.yaml")[0] == 0


def test_quiet_shows_errors_only(capsys: Capture) -> None:
    assert _validate(capsys, "-q", "sound.yaml", "open.yaml") == (0, "", "")
    assert _validate(capsys, "-q", "wrong.yaml")[2] != ""
    assert _validate(capsys, "-q", "--strict", "open.yaml")[2] != ""


@pytest.mark.parametrize("style", ["json", "github", "sarif", "junit"])
def test_forms_for_programs_go_to_standard_output(style: str, capsys: Capture) -> None:
    code, out, err = _validate(capsys, "--format", style, "sound.yaml", "wrong.yaml", "none.yaml")
    assert (code, err) == (1, "")
    assert all(text in out for text in ("wrong.yaml", "none.yaml", "E204", "E201", "E101"))
    assert _validate(capsys, "--format", style, "sound.yaml", "open.yaml")[0] == 0
    assert _validate(capsys, "--format", style, "--strict", "open.yaml")[0] == 1


def test_strict_counts_in_every_form(capsys: Capture) -> None:
    out = {
        style: _validate(capsys, "--strict", "--format", style, "open.yaml")[1]
        for style in ("json", "github", "sarif", "junit")
    }
    (file,) = json.loads(out["json"])["files"]
    assert (file["ok"], file["diagnostics"][0]["severity"]) == (False, "error")
    assert out["github"].startswith("::error file=open.yaml,line=3,col=25,title=W601::")
    assert json.loads(out["sarif"])["runs"][0]["results"][0]["level"] == "error"
    assert ET.fromstring(out["junit"]).get("failures") == "1"


def test_no_form_shows_a_secret(capsys: Capture) -> None:
    text = SOUND.replace("port: 8080", "port: 0, auth: {api_keys: [sk-secret-1]}")
    Path("secret.yaml").write_text(text, encoding="utf-8")
    for style in ("text", "json", "github", "sarif", "junit"):
        code, out, err = _validate(capsys, "--format", style, "secret.yaml")
        assert code == 1
        assert "E204" in out + err
        assert "sk-secret" not in out + err


def test_text_imports_no_other_form() -> None:
    code = (
        "import sys; from runner.cli.main import main; main(['validate', 'sound.yaml'])\n"
        "heavy = {'xml.etree.ElementTree', 'tomllib', 'runner.manifest.formats'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env={"PYTHONPATH": root}
    )
    assert result.returncode == 0, result.stderr


def test_a_folder_that_does_not_fit_is_told_at_its_place(capsys: Capture) -> None:
    write_lora(Path("wide"), queries([0], 512, 512))
    Path("wrong.yaml").write_text(SOUND.replace("./chat}", "./chat, adapters: {wide: ./wide}}"), encoding="utf-8")
    code, out, err = _validate(capsys, "wrong.yaml")
    assert (code, out) == (1, "")
    assert err == (
        "wrong.yaml:3:50: models.chat.adapters.wide: does not fit models.chat: model.layers.0.self_attn.q_proj: the "
        "adapter maps 512 to 512, the model's layer 256 to 256 [E607]\n"
        "    3 | models: {chat: {source: ./chat, adapters: {wide: ./wide}}}\n"
        "      |                                                  ^ give an adapter that was trained on it\n"
    )
    assert _validate(capsys, "--no-files", "wrong.yaml")[0] == 0


def test_all_that_is_wrong_with_folders_is_told_at_once(capsys: Capture) -> None:
    text = SOUND.replace("chat: {source: ./chat}", "chat: {source: ./none}, b: {source: ./chat, adapters: {x: ./y}}")
    Path("wrong.yaml").write_text(text, encoding="utf-8")
    out = _validate(capsys, "--format", "json", "wrong.yaml")[1]
    (file,) = json.loads(out)["files"]
    assert [d["path"] for d in file["diagnostics"]] == ["models.chat.source", "models.b.adapters.x"]
    assert {d["code"] for d in file["diagnostics"]} == {"E601"}


def test_for_another_machine(capsys: Capture) -> None:
    Path("two.yaml").write_text("memory: {limit: 50%}\n" + SOUND, encoding="utf-8")
    assert _validate(capsys, "--for", "memory=16GiB", "two.yaml")[0] == 0
    code, _, err = _validate(capsys, "--for", "memory=4MiB", "two.yaml")
    assert code == 1
    assert "two.yaml:1:17: memory.limit: the models need " in err
    assert "and may use 2 MiB (50% of 4 MiB) [E702]" in err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("16GiB", 'there is no "16GiB"; give memory=SIZE, and device=gpu or device=cpu'),
        ("device=cpu", "give memory=SIZE, such as memory=16GiB"),
        ("memory=16gigs", "give memory=SIZE, such as memory=16GiB"),
        ("memory=16GiB,device=tpu", 'device is gpu or cpu, not "tpu"'),
        ("memory=16GiB,cpus=8", 'there is no "cpus"; give memory=SIZE, and device=gpu or device=cpu'),
        ("memory=16", "memory=16 is 16 bytes: give a unit, such as 16GiB"),
    ],
)
def test_a_machine_that_is_none(given: str, says: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--for", given, "sound.yaml"])
    assert ended.value.code == 64
    assert says in capsys.readouterr().err


def test_memory_is_printed_term_by_term(capsys: Capture) -> None:
    code, out, _ = _validate(capsys, "--memory", "--for", "memory=16GiB", "sound.yaml")
    assert code == 0
    assert out.splitlines() == [
        "sound.yaml: ok (1 model, 1 server)",
        "model  weights  adapters  draft  KV a token          KV at most  prefix cache  prefill peak    total",
        "chat   2.5 MiB         -      -       1 KiB  76 MiB (32 × 2048)       256 MiB       5.5 MiB  340 MiB",
        "may be used: 16 GiB (all of the machine)",
    ]
    out = _validate(capsys, "--memory", "--format", "json", "--for", "memory=16GiB,device=cpu", "sound.yaml")[1]
    memory = json.loads(out)["files"][0]["memory"]
    assert memory["usable_bytes"] == 16 * 2**30
    assert memory["models"]["chat"]["kv_per_token"] == 2048
    assert memory["models"]["chat"]["rows"] == 32


def test_a_port_where_somebody_listens(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    taken = [Problem("W503", ("servers", "main", "port"), "somebody listens there", "another")]
    monkeypatch.setattr(validate, "check_ports", lambda *_: taken)
    code, _, err = _validate(capsys, "sound.yaml")
    assert code == 0
    assert err.startswith("sound.yaml:2:24: warning: servers.main.port: somebody listens there [W503]")
    assert _validate(capsys, "--for", "memory=16GiB", "sound.yaml")[2] == ""
