"""Field by field, in the manifest's words."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from runner.plan.changes import Change, changes
from runner.plan.spec import EngineLimits

from .specs import adapter, listener, model


def test_equal_specs_have_no_changes() -> None:
    assert changes(model(), model()) == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"source": "./b"}, Change("source", "changed", "./chat", "./b")),
        ({"weights_digest": "abcdef0123456789"}, Change("weights", "changed", "w1", "abcdef012345")),
        ({"memory_limit_bytes": 2**30}, Change("memory_limit", "added", None, 2**30, "bytes")),
        ({"aliases": ("gpt", "x")}, Change("aliases", "added", None, ["gpt", "x"])),
        ({"generation": {"temperature": 0.0}}, Change("generation.temperature", "added", None, 0.0)),
        ({"limits": EngineLimits(max_context=4096)}, Change("kv_cache.max_context", "added", None, 4096)),
        ({"limits": EngineLimits(max_rows=4)}, Change("batching.max_rows", "changed", 32, 4)),
        ({"limits": EngineLimits(prefix_cache_bytes=5)}, Change("kv_cache.prefix_cache", "added", None, 5, "bytes")),
        ({"default_adapter": "pirate"}, Change("default_adapter", "added", None, "pirate")),
        ({"adapters": (adapter("pirate"),)}, Change("adapters.pirate.source", "added", None, "/adapters/pirate")),
        ({"path": Path("/elsewhere")}, Change("path", "changed", "/models/chat", "/elsewhere")),
    ],
)
def test_one_edit_is_one_change(fields: dict[str, object], expected: Change) -> None:
    assert changes(model(), model(**fields)) == (expected,)


def test_an_edit_undone_is_the_other_way_round() -> None:
    before, after = model(), model(memory_limit_bytes=7, generation={"top_p": 0.5})
    forth, back = changes(before, after), changes(after, before)
    assert [(c.path, c.old, c.new) for c in back] == [(c.path, c.new, c.old) for c in forth]
    assert {c.change for c in back} == {"removed"}


def test_an_adapter_whose_files_changed() -> None:
    before, after = (model(adapters=(adapter("pirate", digest),)) for digest in ("d1", "d2"))
    assert changes(before, after) == (Change("adapters.pirate.digest", "changed", "pirate-d1", "pirate-d2"),)


def test_a_new_model_tells_what_is_not_default_and_no_digests() -> None:
    assert [c.path for c in changes(None, model(adapters=(adapter("pirate"),)))][:2] == [
        "source",
        "adapters.pirate.source",
    ]
    assert not [c for c in changes(None, model()) if c.path in ("weights", "path")]
    assert [c.change for c in changes(model(), None)] == ["removed"] * len(changes(model(), None))


@pytest.mark.parametrize(
    ("old", "new", "how"), [((), ("a",), "added"), (("a",), ("b",), "changed"), (("a",), (), "removed")]
)
def test_a_secret_says_only_that_it_changed(old: tuple[str, ...], new: tuple[str, ...], how: str) -> None:
    (change,) = changes(listener(api_keys=old), listener(api_keys=new))
    assert change == Change("auth.api_keys", how, secret=True)  # type: ignore[arg-type]
    assert (change.old, change.new) == (None, None)


@dataclass(frozen=True)
class _Inner:
    source: str
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class _Later:
    """A spec with fields that this version does not have."""

    inner: _Inner | None = None
    budget_bytes: int = 0


def test_fields_that_come_later_are_told_too() -> None:
    new = _Later(_Inner("org/x", "s3cret"), 9)
    assert changes(_Later(), new) == (  # type: ignore[arg-type]
        Change("inner.source", "added", None, "org/x"),
        Change("inner.token", "added", secret=True),
        Change("budget", "added", None, 9, "bytes"),
    )
    assert changes(new, replace(new, inner=None)) == (  # type: ignore[arg-type]
        Change("inner.source", "removed", "org/x", None),
        Change("inner.token", "removed", secret=True),
    )
