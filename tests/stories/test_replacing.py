"""Story: weights are exchanged under load, new beside old where memory allows, else one after the other."""

from __future__ import annotations

import json

import pytest

from tests.stories.demo import LONG
from tests.stories.harness import MODELS, Bench
from tests.stories.traffic import Traffic

pytestmark = [pytest.mark.story, pytest.mark.mlx]


def test_weights_are_exchanged_and_no_answer_is_lost(bench: Bench) -> None:
    bench.write({})
    chat = bench.manifest.read_text()
    draft = chat.replace(str(MODELS / "demo-chat"), str(MODELS / "demo-draft"))
    with bench.serving():
        first = bench.model()["pid"]
        with Traffic(bench.client(), LONG, ["none"], count=2) as traffic:
            both, disruption = _apply(bench, "draft", draft)
            assert disruption == "surge"
            second = bench.model()["pid"]
            # Room for each of them and not for both: what runs has to make room, and its requests wait.
            _, disruption = _apply(bench, "tight", f"{chat}memory: {{limit: {both - 1}, reserve: 0}}\n")
            assert disruption == "drain then start"
            third = bench.model()["pid"]
        assert len({first, second, third}) == 3
        assert len(traffic.answers) >= 2
        assert [answer.error for answer in traffic.answers if answer.error] == []
        assert {answer.finish_reason for answer in traffic.answers} <= {"stop", "length"}
        assert bench.status()["in_sync"]


def _apply(bench: Bench, name: str, text: str) -> tuple[int, str]:
    """Hands a manifest over: the most bytes that its plan needs, and the disruption that it says for the model."""
    other = bench.folder / f"{name}.yaml"
    other.write_text(text)
    planned = json.loads(bench.run("plan", "--json", str(other)).stdout)
    done = bench.run("apply", "--json", "--timeout", "60s", str(other))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["plan"]["actions"] == planned["actions"], "what was shown is what was done"
    (action,) = [a for a in planned["actions"] if a["target"] == "models.demo-chat"]
    return planned["memory"]["peak_bytes"], action["disruption"]
