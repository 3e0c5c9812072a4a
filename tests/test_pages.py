"""The pages beside the code: every module is on one, and whatever they name is there."""

import re
from pathlib import Path

import pytest

from runner.cli.main import COMMANDS

RUNNER = Path(__file__).parents[1] / "runner"
PAGES = (RUNNER / "README.md", RUNNER / "engine" / "README.md")
NAMED = re.compile(r"(?<![\w/])([\w/]+\.py)\b")


def _modules() -> list[Path]:
    found = (
        path.relative_to(RUNNER) for path in RUNNER.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    )
    return sorted(path for path in found if path.parent != Path("cli") or path.stem not in COMMANDS)


def test_every_module_is_on_a_page() -> None:
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {Path(name).name for name in NAMED.findall(text)}
    assert [str(path) for path in _modules() if path.name not in named] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    there = {str(path) for path in RUNNER.rglob("*.py")} | {str(path) for path in Path(__file__).parent.rglob("*.py")}
    gone = [
        name
        for name in NAMED.findall(page.read_text(encoding="utf-8"))
        if not any(path.endswith(f"/{name}") for path in there)
    ]
    assert gone == []
