import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runner.control.generations import BadGeneration, Generation, Generations


def header(number: int, **fields: object) -> Generation:
    return Generation(number=number, time=1.5, digest=f"d{number}", via="watch", user="me")._replace(**fields)


class Folder(Generations):
    """Generations that remember what was damaged."""

    def __init__(self, path: Path, kept: int = 100) -> None:
        self.damaged: list[str] = []
        super().__init__(path / "generations", lambda file, reason: self.damaged.append(f"{file.name}: {reason}"), kept)

    def fill(self, *headers: Generation) -> None:
        for one in headers:
            self.write(one, {"plan": {"actions": []}, "spec": {"of": one.number}})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_what_is_written_is_read_back(folder: Folder) -> None:
    assert folder.current() is None
    assert folder.next_number() == 1
    one = header(1, manifest=("/a.yaml",), actions=(("start", "models.a"), ("open", "servers.b")), action_count=2)
    folder.fill(one, header(2, restores=1, manifest_generation=1, seen="s", seconds=1.25))
    assert folder.all() == [one, header(2, restores=1, manifest_generation=1, seen="s", seconds=1.25)]
    assert folder.body(1) == {"plan": {"actions": []}, "spec": {"of": 1}}
    assert folder.next_number() == 3
    assert not folder.damaged


def test_files_and_folder_are_the_owners_alone(folder: Folder) -> None:
    folder.fill(header(1))
    (file,) = folder.folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700


def test_the_current_one_is_the_last_that_went_live(folder: Folder) -> None:
    folder.fill(header(1), header(2), header(3, error="no such port"))
    current = folder.current()
    assert current is not None
    assert current.number == 2
    assert folder.before(2) == header(1)
    assert folder.before(1) is None
    assert folder.find(3) == header(3, error="no such port")
    assert folder.find(4) is None


def test_the_oldest_are_forgotten_and_never_the_current_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path, kept=3)
    folder.fill(header(1), header(2), *(header(n, error="in vain") for n in range(3, 8)))
    assert [one.number for one in folder.all()] == [2, 5, 6, 7]
    folder.fill(header(8))
    assert [one.number for one in folder.all()] == [6, 7, 8]


def test_many_actions_are_counted_and_the_first_ones_listed(folder: Folder) -> None:
    actions = tuple(("start", f"models.m{n}") for n in range(1000))
    folder.fill(header(1, actions=actions, action_count=len(actions)))
    (found,) = folder.all()
    assert found.actions == actions[:24]
    assert found.action_count == 1000


def test_a_file_cut_anywhere_is_passed_over_and_the_one_before_is_current(folder: Folder) -> None:
    folder.fill(header(1), header(2, actions=(("start", "models.ä"),)))
    path = folder.folder / "00000002.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        again = Folder(folder.folder.parent)
        assert again.all() == [header(1)], whole[:length]
        current = again.current()
        assert current is not None
        assert current.number == 1
        assert again.next_number() == 3, "the number of a damaged one is not used again"
        assert len(again.damaged) == 1, "it is said once"
    path.write_bytes(whole)
    assert [one.number for one in Folder(folder.folder.parent).all()] == [1, 2]


def test_a_body_that_was_changed_is_noticed(folder: Folder) -> None:
    folder.fill(header(1))
    path = folder.folder / "00000001.json"
    path.write_bytes(path.read_bytes().replace(b'"of":1', b'"of":2'))
    with pytest.raises(BadGeneration, match="not what was written"):
        folder.body(1)
    with pytest.raises(BadGeneration, match="No such file"):
        folder.body(2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ends in the middle"),
        (b"hello\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b"{}\n", "has format None"),
        (b'{"format": 2}\n', "has format 2, this version reads 1"),
        (b'{"format": 1}\n', "its body_bytes is None"),
        (b'{"format": 1, "body_bytes": "many"}\n', "its body_bytes is 'many'"),
        (b'{"format": 1, "body_bytes": 5}\n', "has 31 bytes where it should have 36"),
        (b'{"format": 1, "body_bytes": 0, "time": 1e300}\n', "its time is 1e+300"),
        (b'{"format": 1, "body_bytes": 0, "time": NaN}\n', "its time is nan"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (bytes(range(256)) + b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
    ],
)
def test_what_was_not_written_by_us(folder: Folder, content: bytes, reason: str) -> None:
    folder.fill(header(1))
    (folder.folder / "00000009.json").write_bytes(content)
    assert folder.all() == [header(1)]
    assert reason in folder.damaged[0]


@pytest.mark.parametrize("name", [*Generation._fields, "body_bytes"])
@pytest.mark.parametrize("value", [None, True, -1, 1.5, "text", [1], [["start"]], {"a": 1}])
def test_a_header_with_a_wrong_field_is_passed_over_or_right_by_type(folder: Folder, name: str, value: object) -> None:
    folder.fill(header(1), header(2))
    path = folder.folder / "00000002.json"
    first, body = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(json.dumps({**json.loads(first), name: value}).encode() + b"\n" + body)
    found = folder.all()
    assert found[0] == header(1)
    for one in found[1:]:
        assert all(type(a) is type(b) or isinstance(a, int | float) for a, b in zip(one, header(2), strict=True))


def test_other_files_are_left_alone(folder: Folder) -> None:
    folder.fill(header(1))
    for name in ("notes.txt", "3.json", "abcdefgh.json", "0000000².json", ".mine"):
        (folder.folder / name).write_text("mine")
    (folder.folder / ".00000001.json.123").write_text("half of one, by a runner that was killed")
    (folder.folder / ".00000001.json.git").mkdir()
    folder.fill(header(2))
    assert {path.name for path in folder.folder.iterdir()} == {
        "00000001.json", "00000002.json", "notes.txt", "3.json", "abcdefgh.json", "0000000².json", ".mine",
        ".00000001.json.git",
    }  # fmt: skip
    assert [one.number for one in folder.all()] == [1, 2]


def test_a_writer_that_is_killed_leaves_the_last_good_one_readable(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runner.control.generations import Generation, Generations\n"
        "store = Generations(Path(sys.argv[1]), print); number = store.next_number()\n"
        "while True:\n"
        "    store.write(Generation(number, 1.0, 'd', 'watch', 'me'), {'spec': 'x' * 50_000})\n"
        "    print(number, flush=True); number += 1"
    )
    seen = 0
    for _ in range(8):
        command = [sys.executable, "-c", code, str(tmp_path / "generations")]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(3):
            seen = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate()[0].split()
        seen = max([seen, *map(int, rest)])
        folder = Folder(tmp_path)
        current = folder.current()
        assert current is not None
        assert seen <= current.number <= seen + 1, "one may be written and not said yet"
        assert folder.body(current.number) == {"spec": "x" * 50_000}
        assert not folder.damaged
    folder.fill(header(folder.next_number()))
    assert not list(folder.folder.glob(".*")), "what was half-written is cleared away"
