import asyncio
import json
from pathlib import Path

import pytest

from runner.cli.history import result
from runner.cli.main import main
from runner.control.generations import Generation, Generations
from tests.control.scene import Scene, free_port


async def run(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


async def edited(up: Scene) -> None:
    """A second generation, with an adapter and another alias."""
    up.write("chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate}}")
    await up.event("applied", 2)


async def test_history_and_rollback_as_a_user_sees_them(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    await edited(up)
    assert await run("rollback", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Back to generation 1 from 2:\n")
    assert "models.chat" in shown
    assert await run("rollback", "--wait") == 0
    assert "Rolled back to generation 1; it is live as generation 3." in capsys.readouterr().out
    assert await run("history") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["WHEN", "BY", "DIGEST", "CHANGES", "RESULT"]
    assert [row.split()[0] for row in rows] == ["3", "2", "1"]
    assert ", rollback to 1" in rows[0]
    assert [row.rsplit("  ", 1)[1] for row in rows] == ["current", "rolled back", "superseded"]
    assert "~models.chat" in rows[1]
    assert "+servers.lm, +models.chat" in rows[2]
    assert await run("status") == 3
    shown = capsys.readouterr().out
    assert "Drift: rolled back to 1; the manifest was last applied as 2." in shown
    assert await run("wait", "--for", "ready") == 0, "nothing is left to do"
    assert await run("wait", "--for", "sync", "--timeout", "0") == 1
    assert "rolled back to 1" in capsys.readouterr().err


async def test_json_and_without_a_runner(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    await edited(up)
    assert up.runner is not None
    assert up.running is not None
    up.runner._stop.set()
    await up.running
    assert await run("history", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["generation"], first["result"], first["via"]) == (1, "superseded", "start")
    assert (second["result"], second["actions"]) == ("current", [["update", "models.chat"]])
    assert "seen" not in first
    (up.folder / "state" / "dev" / "generations" / "00000002.json").write_text("{")
    assert await run("history", "dev") == 0
    captured = capsys.readouterr()
    assert "00000002.json is passed over: it ends in the middle" in captured.err
    assert "current" in captured.out.splitlines()[1]


async def test_what_differs(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    (up.folder / "key").write_text("sk-hunter2")
    more = f'more: {{port: {free_port()}, auth: {{api_keys: ["${{file:key}}"]}}}}'
    up.write("chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate}}", servers=more)
    await up.event("applied", 2)
    assert await run("diff", "1") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "dev: generation 1 → 2"
    assert "\n  + servers.more\n" in shown
    assert "      + auth.api_keys: (secret, added)\n" in shown
    assert "\n  ~ models.chat\n" in shown
    assert '      - aliases: ["gpt-x"]\n' in shown
    assert "adapters.pirate.source" in shown
    assert "hunter2" not in shown
    (up.folder / "key").write_text("sk-hunter3")
    await up.event("applied", 3)
    assert await run("diff", "2", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == [
        {"target": "servers.more", "change": "changed",
         "changes": [{"path": "auth.api_keys", "change": "changed", "secret": True}]}
    ]  # fmt: skip
    assert await run("diff", "3") == 0
    assert capsys.readouterr().out == "Nothing differs between the generations 3 and 3.\n"
    assert await run("diff", "3", "9") == 1
    assert "there is no generation 9\nThere are: 1, 2, 3." in capsys.readouterr().err
    path = up.folder / "state" / "dev" / "generations" / "00000001.json"
    path.write_bytes(path.read_bytes().replace(b'"spec":', b'"sqec":'))
    assert await run("diff", "1") == 1
    assert "generation 1 was written by another version, or is damaged" in capsys.readouterr().err


async def test_what_is_in_the_way_is_said(up: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("rollback") == 1
    assert "there is no generation before 1" in capsys.readouterr().err
    assert await run("rollback", "9", "--dry-run") == 1
    assert capsys.readouterr().err == "error: there is no generation 9\nThere are: 1.\n"
    await edited(up)
    assert await run("rollback", "--generation", "1") == 1
    assert "generation 2 is current" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        await run("rollback", "one")


def test_whose_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path))
    assert main(["history"]) == 1
    assert "there was no runner yet" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    assert main(["history"]) == 0
    assert capsys.readouterr().out == "Nothing was applied yet.\n"
    (tmp_path / "two").mkdir()
    assert main(["history"]) == 1
    assert "there are several runners: one, two" in capsys.readouterr().err
    assert main(["history", "three"]) == 1


def test_long_entries_are_short_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_RUN_STATE_DIR", str(tmp_path))
    actions = tuple(("start", f"models.m{n}") for n in range(30))
    failed = Generation(1, 0.0, "d" * 32, "apply", "jo", error="port taken\nmore", attempts=3)
    (tmp_path / "dev").mkdir()
    store = Generations(tmp_path / "dev" / "generations", lambda path, reason: None)
    store.write(failed._replace(actions=actions, action_count=30), {})
    assert main(["history"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert "models.m5, 24 more" in row
    assert "models.m6" not in row
    assert row.endswith("failed (3 times): port taken")


def test_results() -> None:
    one, failed, two, back = (
        Generation(n, 0.0, "d", "watch", "me", error=error, restores=restores)
        for n, error, restores in [(1, "", 0), (2, "no", 0), (3, "", 0), (4, "", 1)]
    )
    found = [one, failed, two, back]
    assert [result(h, back, found) for h in found] == ["superseded", "failed", "rolled back", "current"]
