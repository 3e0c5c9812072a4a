"""A chat template of the manifest's own: found, watched, and part of what a process is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runner.engine.answer.conventions import TOOL_PARSERS
from runner.errors import ManifestError
from runner.manifest import models
from runner.plan.actions import ReplaceModel
from runner.plan.digests import DigestCache
from runner.plan.planner import Observed, plan
from runner.plan.verify import changed_sources

from .conftest import Place
from .folders import model

TEXT = "name: dev\nservers: {lm: {port: 8080}}\nmodels: {chat: {source: ../chat, chat_template: ../t.jinja}}\n"


def test_it_is_part_of_what_a_process_is(place: Place, tmp_path: Path) -> None:
    model(tmp_path / "chat")
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    first = place.resolve(TEXT)
    assert first.models[0].chat_template is not None
    assert first.models[0].chat_template.path == template
    assert list(changed_sources(first.models[0], DigestCache())) == []
    template.write_text("{{ messages | length }}")
    (changed,) = changed_sources(first.models[0], DigestCache())
    assert changed.path == "models.chat.chat_template"
    (action,) = plan(place.resolve(TEXT), Observed(first.models, first.listeners)).actions
    assert isinstance(action, ReplaceModel)
    assert action.reason == "the chat template changed"
    spec = first.models[0]
    (action,) = plan(replace(first, models=(replace(spec, tool_parser="llama3"),)), Observed(first.models)).actions[1:]
    assert action.reason == "tool_parser by the template → llama3"


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_one_that_cannot_be_read(place: Place, tmp_path: Path, content: bytes | None) -> None:
    model(tmp_path / "chat")
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(ManifestError, match=r"models\.chat\.chat_template: the chat template .* \[E612\]"):
        place.resolve(TEXT)


def test_the_manifest_knows_the_parsers_that_the_engine_has() -> None:
    assert models.ToolParser.__args__ == TOOL_PARSERS  # type: ignore[attr-defined]
