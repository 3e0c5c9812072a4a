"""Parts of a manifest: what is left out stays as it is, whatever it is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import RunnerError
from runner.plan.planner import Observed, plan
from runner.plan.scope import Scope, require_targets, within
from runner.plan.spec import Desired, Download, ListenerSpec, ModelSpec

from .specs import GIB, UNHURRIED, desired, listener, model, observed, states

A, B = Scope(("a",)), Scope(("models.b",))
KEEP = Scope(prune=False)


def names(made: Desired) -> list[str]:
    return [m.name for m in made.models]


def serving(*models: str, name: str = "lm", **fields: object) -> ListenerSpec:
    return listener(name, models=models, **fields)


def test_the_whole_manifest_is_what_it_is() -> None:
    wanted = desired(model("a"))
    assert within(Scope(), wanted, observed(model("b"))) is wanted


def test_a_target_is_changed_and_the_rest_stays() -> None:
    running = observed(model("a"), model("b"), model("gone"), listeners=(serving("a", "b", "gone"),))
    wanted = desired(model("a", "w2"), model("b", "w2"), model("new"), listeners=(serving("a", "b", "new", port=9000),))
    made = within(A, wanted, running)
    assert made.models == (model("a", "w2"), model("b"), model("gone"))
    assert made.listeners == running.listeners
    assert [a.target for a in plan(made, running).actions] == ["models.a"]


def test_a_target_brings_along_that_its_servers_serve_it() -> None:
    running = observed(model("a"), listeners=(serving("a"),))
    wanted = desired(
        model("a"), model("b"),
        listeners=(serving("a", "b"), serving("a", "b", name="more", port=9000), serving("a", name="none", port=9001)),
    )  # fmt: skip
    made = within(B, wanted, running)
    assert names(made) == ["a", "b"]
    assert [(s.name, s.models) for s in made.listeners] == [("lm", ("a", "b")), ("more", ("a", "b"))]


def test_from_nothing_only_what_the_target_needs_comes_up() -> None:
    made = within(A, desired(model("a"), model("b"), listeners=(serving("a", "b"),)), Observed())
    assert names(made) == ["a"]
    assert made.listeners == (serving("a"),)


def test_a_target_that_is_not_in_the_manifest_any_more_goes() -> None:
    running = observed(model("a"), model("b"), listeners=(serving("a", "b"),))
    made = within(B, desired(listeners=()), running)
    assert names(made) == ["a"]
    assert made.listeners == (serving("a"),)
    assert within(replace(B, prune=False), desired(listeners=()), running).models == running.models


def test_a_server_is_a_target_too() -> None:
    running = observed(model("a"), listeners=(serving("a"),))
    wanted = desired(model("a", "w2"), model("b"), listeners=(serving("a", "b", port=9000),))
    made = within(Scope(("servers.lm",)), wanted, running)
    assert made.models == running.models
    assert made.listeners == (serving("a", port=9000),)


def test_without_pruning_what_the_manifest_does_not_name_is_served_on() -> None:
    running = observed(
        model("a"), model("old", aliases=("gpt", "x")),
        listeners=(serving("a", "old"), serving("old", name="private", port=9000)),
    )  # fmt: skip
    wanted = desired(model("a", aliases=("gpt",)), model("new"), listeners=(serving("a", "new", port=8081),))
    made = within(KEEP, wanted, running)
    assert made.models == (*wanted.models, model("old", aliases=("x",))), "an alias is whose the manifest says"
    assert made.listeners == (serving("a", "new", "old", port=8081), serving("old", name="private", port=9000))


@pytest.mark.parametrize(
    ("scope", "wanted", "running", "says"),
    [
        (A, desired(model("a", aliases=("x",))), observed(model("b", aliases=("x",))), "'x' would mean both"),
        (KEEP, desired(model("a", aliases=("b",))), observed(model("b")), "--prune=false: 'b' would mean both"),
        (KEEP, desired(), observed(listeners=(listener("old"),)), "would both have port 8080"),
        (KEEP, desired(listeners=(listener(host="0.0.0.0"),)), observed(listeners=(listener("old"),)), "port 8080"),
        (A, desired(model("a"), limit=GIB), observed(model("b")), "2,147,483,648 bytes together, and 1,073,741,824"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_together(scope: Scope, wanted: Desired, running: Observed, says: str) -> None:
    with pytest.raises(RunnerError) as caught:
        within(scope, wanted, running)
    assert says in caught.value.message
    assert caught.value.hint


def test_a_target_that_is_nowhere() -> None:
    wanted, running = desired(model("a")), observed(model("b"))
    for target in ("a", "b", "models.a", "servers.lm"):
        require_targets(Scope((target,)), wanted, running)
    with pytest.raises(RunnerError, match="--target typo: neither") as caught:
        require_targets(Scope(("a", "typo")), wanted, running)
    assert "Models: a, b." in caught.value.hint
    assert within(Scope(("typo",)), wanted, running).models == running.models


def test_two_addresses_may_have_one_port() -> None:
    running = observed(listeners=(listener("old", host="127.0.0.2"),))
    assert len(within(KEEP, desired(), running).listeners) == 2


def test_only_what_the_targets_need_is_downloaded() -> None:
    downloads = (
        Download("org/a", "main", None, ("models.a",)),
        Download("org/b", "main", None, ("models.b", "models.a.adapters.x")),
        Download("org/c", "main", None, ("models.b", "models.b.adapters.y")),
    )
    wanted = replace(desired(model("a"), model("b")), downloads=downloads)
    assert within(A, wanted, Observed(memory_bytes=16 * GIB)).downloads == downloads[:2]


@pytest.mark.parametrize(("target", "due"), [("qwen2", [0]), ("qwen2.5", [1, 2])])
def test_a_name_with_a_dot_is_a_name(target: str, due: list[int]) -> None:
    downloads = (
        Download("org/a", "main", None, ("models.qwen2",)),
        Download("org/b", "main", None, ("models.qwen2.5",)),
        Download("org/c", "main", None, ("models.qwen2.5.adapters.x",)),
    )
    wanted = replace(desired(model("qwen2"), model("qwen2.5")), downloads=downloads)
    found = within(Scope((target,)), wanted, Observed(memory_bytes=16 * GIB)).downloads
    assert found == tuple(downloads[at] for at in due)


@UNHURRIED
@given(states, states, st.sets(st.sampled_from(["a", "b", "c", "d"]), min_size=1))
def test_nothing_but_the_targets_is_touched(
    before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...], targets: set[str]
) -> None:
    running, wanted = observed(*before), desired(*after, limit=100 * GIB)
    try:
        made = within(Scope(tuple(sorted(targets))), wanted, running)
    except RunnerError:
        return  # an alias that moves has a test above
    for name in "abcd":
        side = wanted.models if name in targets else running.models
        assert [m for m in made.models if m.name == name] == [m for m in side if m.name == name]
    again = within(
        Scope(tuple(sorted(targets))), wanted, replace(running, models=made.models, listeners=made.listeners)
    )
    assert plan(again, replace(running, models=made.models, listeners=made.listeners)).empty, "twice is once"


@UNHURRIED
@given(states, states)
def test_without_pruning_nothing_goes(before: tuple[ModelSpec, ...], after: tuple[ModelSpec, ...]) -> None:
    running, wanted = observed(*before), desired(*after, limit=100 * GIB)
    try:
        made = within(KEEP, wanted, running)
    except RunnerError:
        return
    assert {m.name for m in made.models} == {m.name for m in before} | {m.name for m in after}
    assert made.models[: len(after)] == after


def test_the_scope_in_words() -> None:
    assert str(Scope(("a", "servers.lm"), prune=False)) == "--target a --target servers.lm --prune=false"
