import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from runner.plan.spec import AdapterSpec, Desired, EngineLimits, ListenerSpec, ModelSpec
from runner.plan.stored import (
    NotReadable,
    SealedAway,
    from_stored,
    key_sources,
    stored_digest,
    stored_form,
    to_compare,
)


def seal(secret: str) -> str:
    return f"sealed-{sum(secret.encode())}"


MODEL = ModelSpec(
    name="chat",
    source="./models/chat",
    path=Path("/m/models/chat"),
    weights_digest="w1",
    weights_bytes=1000,
    aliases=("gpt-x",),
    adapters=(AdapterSpec("pirate", Path("/m/a/pirate"), "a1", 2.5),),
    default_adapter="pirate",
    generation={"temperature": 0.5, "stop": ["a", "b"], "chat_template_kwargs": {"deep": {"er": None}}},
    limits=EngineLimits(max_rows=4),
    memory_limit_bytes=5,
)
OPEN = ListenerSpec("lm", "127.0.0.1", 8080, ("chat",))
LOCKED = ListenerSpec(
    "lan",
    "0.0.0.0",
    8081,
    ("chat",),
    api_keys=("sk-hunter2", "sk-other", "sk-third"),
    api_key_sources=("file:/m/key", "variable:KEY", ""),
    allow_origins=("http://a.b",),
)
DESIRED = Desired("dev", (MODEL,), (OPEN, LOCKED), memory_limit_bytes=7)


def test_it_comes_back_as_it_was() -> None:
    kept = json.loads(json.dumps(stored_form(DESIRED, seal)))
    again = from_stored(kept, seal, ["unrelated", *LOCKED.api_keys])
    assert again == DESIRED
    assert again.listeners[1].api_key_sources == LOCKED.api_key_sources
    assert again.listeners[1].api_keys == LOCKED.api_keys


def test_no_secret_is_in_it() -> None:
    text = json.dumps(stored_form(DESIRED, seal))
    assert "hunter2" not in text
    assert not any(key in text for key in LOCKED.api_keys)
    assert key_sources(stored_form(DESIRED, seal)) == ("file:/m/key", "variable:KEY", "")


def test_every_secret_of_a_spec_is_known_here() -> None:
    """A field without a repr is a secret; one that is added has to be sealed as well."""
    hidden = set()
    todo, done = [Desired], set()
    while todo:
        spec: Any = todo.pop()
        done.add(spec)
        hidden |= {(spec.__name__, f.name) for f in fields(spec) if not f.repr}
        hints = get_type_hints(spec).values()
        inner = {part for hint in hints for part in (hint, *get_args(hint)) if isinstance(part, type)}
        todo += [part for part in inner if is_dataclass(part) and part not in done]
    assert ModelSpec in done
    assert AdapterSpec in done
    assert hidden == {("ListenerSpec", "api_keys")}


def test_the_digest_is_of_what_is_wanted_and_not_of_where_keys_came_from() -> None:
    digest = stored_digest(stored_form(DESIRED, seal))
    moved = replace(DESIRED, listeners=(OPEN, replace(LOCKED, api_key_sources=("", "", ""))))
    assert stored_digest(stored_form(moved, seal)) == digest
    for other in (
        replace(DESIRED, memory_limit_bytes=8),
        replace(DESIRED, models=(replace(MODEL, generation={}),)),
        replace(DESIRED, listeners=(OPEN, replace(LOCKED, api_keys=("sk-hunter3", "sk-other", "sk-third")))),
    ):
        assert stored_digest(stored_form(other, seal)) != digest


def test_keys_that_nobody_brings_are_named() -> None:
    kept = stored_form(DESIRED, seal)
    with pytest.raises(SealedAway) as missing:
        from_stored(kept, seal, ["sk-other"])
    assert missing.value.missing == (("lan", "file:/m/key"), ("lan", ""))
    compared = to_compare(kept, seal, ["sk-other"])
    assert compared.models == DESIRED.models
    assert compared != DESIRED
    assert to_compare(kept, seal, LOCKED.api_keys) == DESIRED


def test_a_spec_of_an_older_version_has_the_defaults_of_what_it_lacks() -> None:
    kept = stored_form(DESIRED, seal)
    del kept["models"][0]["limits"]["prefill_step_size"]
    kept["models"][0]["of_the_future"] = 1
    assert from_stored(kept, seal, LOCKED.api_keys) == DESIRED


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"listeners": 3},
        {"listeners": [{}]},
        {"listeners": [], "models": [{}]},
        {"listeners": [], "models": "none", "name": "dev"},
        {"listeners": [{"name": "lm", "api_keys": [{}]}]},
        {"listeners": [{"name": "lm", "api_keys": [{"seal": [], "source": ""}]}]},
        {"listeners": [], "models": [{**stored_form(DESIRED, seal)["models"][0], "path": 3}], "name": "dev"},
    ],
)
def test_what_is_not_a_stored_spec(damage: dict[str, Any]) -> None:
    with pytest.raises(NotReadable):
        from_stored(damage, seal, [])
