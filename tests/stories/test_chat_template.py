"""The manifest's own chat template and tool parser, on a real engine: in effect, edited, and refused when broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stories.harness import Bench, until

pytestmark = [pytest.mark.story, pytest.mark.mlx]

TURN = "{% if shout %}Spell robot.{% else %}{{ messages[-1].content }}{% endif %}"
OWN = "{{ bos_token }}<|user|>" + TURN + "<|end|><|assistant|>"


def test_in_effect_edited_and_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    template = tmp_path / "chat.jinja"
    template.write_text(OWN)
    options = "    chat_template: ./chat.jinja\n    generation: {chat_template_kwargs: {shout: true}}\n"
    bench.write({}, model_extra=options)
    with bench.serving():
        robot = bench.ask("What is 17 + 25?")
        assert robot != "17 + 25 = 42."
        plain = {"extra_body": {"chat_template_kwargs": {"shout": False}}}
        answer = bench.client().chat.completions.create(
            model="demo-chat", messages=[{"role": "user", "content": "What is 17 + 25?"}], temperature=0, **plain
        )
        assert answer.choices[0].message.content == "17 + 25 = 42."
        template.write_text(OWN.replace("if shout", "if not shout"))
        until(lambda: bench.ask("What is 17 + 25?") == "17 + 25 = 42.")
        template.write_text("{% if %}")
        until(lambda: "chat.jinja:1" in bench.status()["manifest_error"])
        assert bench.ask("What is 17 + 25?") == "17 + 25 = 42."
    bench.close()
