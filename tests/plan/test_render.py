"""The plan's JSON form against its schema, and never a secret in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from runner.cli.plan_text import render_plan
from runner.plan.actions import Against
from runner.plan.planner import Observed, plan
from runner.plan.render import FORMAT_VERSION, VERBS, plan_json
from runner.plan.spec import Download, ListenerSpec, ModelSpec

from .specs import GIB, UNHURRIED, adapter, desired, listener, model, observed, ports, states

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas" / "plan.schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def sound(made: dict[str, Any]) -> dict[str, Any]:
    """The plan as a reader gets it; fails where the schema does not describe it."""
    read: dict[str, Any] = json.loads(json.dumps(made))
    VALIDATOR.validate(read)
    return read


def test_the_schema_is_one_and_of_this_version() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["version"]["const"] == FORMAT_VERSION
    assert set(SCHEMA["definitions"]["action"]["properties"]["action"]["enum"]) == set(VERBS.values())


@UNHURRIED
@given(states, states, ports, ports)
def test_every_plan_is_as_the_schema_says_and_has_no_secret(
    before: tuple[ModelSpec, ...],
    after: tuple[ModelSpec, ...],
    had: tuple[ListenerSpec, ...],
    has: tuple[ListenerSpec, ...],
) -> None:
    made = plan(desired(*after, listeners=has, limit=6 * GIB), observed(*before, listeners=had))
    data = sound(plan_json(made))
    assert [a["target"] for a in data["actions"]] == [a.target for a in made.actions]
    for text in (json.dumps(data), render_plan(data, diff=True), repr(made)):
        assert "s3cret" not in text


@pytest.mark.parametrize("missing", ["version", "memory", "actions"])
def test_the_schema_refuses_what_is_not_a_plan(missing: str) -> None:
    data = plan_json(plan(desired(model()), observed()))
    del data[missing]
    assert not VALIDATOR.is_valid(data)


def test_the_schema_refuses_a_secret_with_a_value() -> None:
    data = plan_json(plan(desired(listeners=(listener(api_keys=("k",)),)), observed()))
    (change,) = data["actions"][0]["changes"]
    assert change == {"path": "auth.api_keys", "change": "added", "secret": True}
    change["new"] = "k"
    assert not VALIDATOR.is_valid(data)


def test_the_text_of_a_plan() -> None:
    old = model("chat", "w1", 4 * GIB, source="./a", aliases=("gpt",))
    new = model("chat", "w2", 5 * GIB, source="./b", memory_limit_bytes=6 * GIB, adapters=(adapter("pirate"),))
    to = replace(
        desired(new, listeners=(listener(api_keys=("k",)),), limit=5 * GIB),
        downloads=(Download("org/x", "main", None, ("models.chat",)), Download("org/y", "v1", GIB, ("models.chat",))),
    )
    seen = replace(observed(old, model("gone", "w3", GIB)), against=Against("runner", 4))
    assert render_plan(sound(plan_json(plan(to, seen))), diff=True).splitlines() == [
        "dev: 3 to do, 0 unchanged (against what runs, generation 4).",
        "  ~ servers.lm   update   in place                   changed: auth.api_keys",
        "      + auth.api_keys: (secret, added)",
        "  - models.gone  stop     drain then stop, first     removed from the manifest",
        "      - source: ./gone",
        "  ± models.chat  replace  drain then start +1.0 GiB  source ./a → ./b",
        "      its requests wait meanwhile; one that has waited 30 s gets 503 with Retry-After",
        "      ~ source: ./a → ./b",
        "      ~ weights: w1 → w2",
        "      + adapters.pirate.source: /adapters/pirate",
        "      + memory_limit: 6.0 GiB",
        '      - aliases: ["gpt"]',
        "Download: org/x (main), size unknown, for models.chat.",
        "Download: org/y (v1), 1.0 GiB, for models.chat.",
    ]


def test_the_text_without_a_diff_and_of_nothing_to_do() -> None:
    made = plan_json(plan(desired(model()), Observed(memory_bytes=16 * GIB)))
    assert render_plan(made).splitlines() == [
        "dev: 2 to do, 0 unchanged (nothing is deployed).",
        "  + servers.lm   open   start           new in the manifest",
        "  + models.chat  start  start +1.0 GiB  not running",
        "Memory: 0 B → 1.0 GiB; 16.0 GiB may be used.",
    ]
    nothing = plan_json(plan(desired(model()), replace(observed(model()), against=Against("generation", 3))))
    assert render_plan(nothing) == (
        "dev: nothing to do, 2 unchanged (no runner is up: against what was live last, generation 3)."
    )
